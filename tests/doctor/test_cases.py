"""Whole runs as people have them, each with what the doctor should say of it: what is found, and above all what is not. A
critical finding has to be on the list, so that no case can hide a false alarm."""

from __future__ import annotations

import json
import pickle

import pytest
import torch

from fastgpt.doctor import __main__ as doctor
from tests.doctor.runs import SOUND

BIG = "batch_size = 8\ngradient_accumulation_steps = 64\nmax_iters = 6000\nlr_decay_iters = 6000\nwarmup_iters = 100\n"
"""Half a million tokens per step, 3.1B in all, the model nanoGPT's own."""
OURS = "[model]\nn_layer = 12\n[data]\nbatch_size = 8\ngrad_accum = 64\n[train]\nmax_iters = 6000\n"
SMALL = (
    "n_layer = 6\nn_head = 6\nn_embd = 384\nblock_size = 256\nbatch_size = 64\ngradient_accumulation_steps = 1\n"
    "max_iters = 5000\nlr_decay_iters = 5000\nwarmup_iters = 100\neval_interval = 250\neval_iters = 20\n"
)
"""nanoGPT's small character model."""


def steps(n=30, every=10, start=0, ms=2000.0, mfu="15.00", first="-100.00", loss=10.8):
    """Step lines of nanoGPT."""
    return "".join(
        f"iter {start + i * every}: loss {max(3.0, loss - i / 5):.4f}, time {ms:.2f}ms, mfu {mfu if i else first}%\n"
        for i in range(n)
    )


def mfu(flops_per_step, ms):
    return f"{100 * flops_per_step / (ms / 1e3) / 312e12:.2f}"


COUNTED = "tokens per iteration will be: 524,288\nnumber of parameters: 123.59M\n"
ENDED = COUNTED + steps(12)
GPT2 = 854_438_400 * 524_288
"""FLOPs of a step of the sound config."""

CASES = {
    # --- what settings mean ---
    "weights of gpt2-medium": (
        "init_from = 'gpt2-medium'\n# 350M parameters\neval_only = True\neval_iters = 400\n",
        None,
        dict(code=0, figures={"parameters": 353_774_592, "tokens_planned": None}),
    ),
    "weights of gpt2": (
        "init_from = 'gpt2'\nn_embd = 384\n" + BIG,
        None,
        dict(code=0, figures={"parameters": 123_653_376}),
    ),
    "weights of gpt2-xl, a few steps": (
        "init_from = 'gpt2-xl'\nbatch_size = 1\nmax_iters = 20\nlr_decay_iters = 20\n"
        "warmup_iters = 0\neval_interval = 5\neval_iters = 2\n",
        None,
        dict(absent={"few"}, figures={"tokens_per_parameter": None}),
    ),
    "weights of gpt2, called 350M": (
        "init_from = 'gpt2'\nwandb_run_name = 'tune-350M'\n" + BIG,
        None,
        dict(sure={"param_count_mismatch": "possible"}, absent_text=["n_embd ="]),
    ),
    "nothing is trained": (
        BIG + "eval_only = True\nwarmup_iters = 9000\nmin_lr = 1\neval_interval = 1\n",
        None,
        dict(code=0),
    ),
    "a rate that stays": (
        SOUND + "decay_lr = False\nwarmup_iters = 7000\nmin_lr = 0.5\nlr_decay_iters = 10\n",
        None,
        dict(code=0),
    ),
    "experts": (
        "wandb_run_name = 'moe-1B'\nn_exp = 32\ntop_k = 2\nn_embd = 512\n" + BIG,
        None,
        dict(found={"unknown_settings"}, figures={"parameters": None}, absent_text=["n_embd = 2304"]),
    ),
    "grouped heads": (
        "# a 1.5B model\nn_kv_head = 4\n" + BIG,
        None,
        dict(found={"unknown_settings"}, figures={"parameters": None}),
    ),
    "SwiGLU": (
        "# a 1.5B model\nuse_swiglu = True\n" + BIG,
        None,
        dict(found={"unknown_settings"}, figures={"parameters": None}),
    ),
    "a wider MLP": (
        "# a 1.5B model\nmlp_ratio = 8\n" + BIG,
        None,
        dict(found={"unknown_settings"}, figures={"parameters": None}),
    ),
    "a shape in a file of its own": (
        "# a 1.5B model\nllama_config_path = 'a.json'\n" + BIG,
        None,
        dict(found={"unknown_settings"}, figures={"parameters": None}),
    ),
    "a part that is switched off": ("use_moe = False\n" + BIG, None, dict(code=0, figures={"parameters": 123_587_328})),
    "settings that leave the model alone": (
        "seed = 3\nwandb_tags = 'a'\nsave_every = 5\nnum_workers = 2\nmuon_lr = 0.02\n" + BIG,
        None,
        dict(code=0, figures={"parameters": 123_587_328}),
    ),
    "what a fork leaves out is its own": (
        "seed = 3\nbatch_size = 8\ngradient_accumulation_steps = 64\nmax_iters = 1000\nmin_lr = 1e-3\n",
        None,
        dict(
            absent={"min_lr_above_lr", "warmup_too_long", "decay_cut_off"},
            sure={"few": "possible"},
            text=["n_layer, n_head, n_embd, bias assumed: nanoGPT's default, in the config of a fork"],
        ),
    ),
    "what a fork says is its own, too": (
        "seed = 3\n" + BIG + "warmup_iters = 6000\nlearning_rate = 1e-4\nmin_lr = 1e-3\n",
        None,
        dict(
            critical={"min_lr_above_lr", "warmup_too_long"},
            sure={"min_lr_above_lr": "certain"},
            text=["warmup_iters 6,000 takes the whole run: max_iters is 6,000"],
        ),
    ),
    "a name that other lines compute with": (
        "wide = 12\nn_embd = wide * 64\n" + BIG,
        None,
        dict(code=0, figures={"parameters": 123_587_328}),
    ),
    # --- what names and comments mean ---
    "a size and tokens in one name": ("wandb_run_name = 'small-124m-3B'\n" + BIG, None, dict(code=0)),
    "tokens alone in a name": ("wandb_run_name = 'run-3B'\n" + BIG, None, dict(code=0)),
    "another size, and tokens": (
        "out_dir = 'out-350M-3B'\n" + BIG,
        None,
        dict(sure={"param_count_mismatch": "possible"}, text=["350M", "Nothing, if it speaks of another model."]),
    ),
    "the name of a project": (
        "wandb_project = '7B-distill'\n" + BIG,
        None,
        dict(sure={"param_count_mismatch": "possible"}),
    ),
    "a comment on another model": (
        "# half the layers of the 350M model\n" + BIG + "bias = False  # as in the paper's 1.3B model\n",
        None,
        dict(sure={"param_count_mismatch": "possible"}),
    ),
    "a micro-step in a comment": (
        "# micro-step: 8 x 1024 = 8,192 tokens/step (micro-step); all in all 524,288 tokens/step\n" + BIG,
        None,
        dict(code=0),
    ),
    "a micro-step alone": ("# micro-batch: 8 x 1024 = 8,192 tokens\n" + BIG, None, dict(code=0)),
    "a budget that no longer fits": (
        "# this makes total number of tokens be 300B\n" + BIG,
        None,
        dict(found={"token_budget_comment"}, text=["3.15B"]),
    ),
    # --- the vocabulary ---
    "data of one's own": (
        "dataset = 'mine'\n" + SMALL,
        None,
        dict(
            sure={"few": "possible"},
            figures={"parameters": 29_940_864},
            text=["vocabulary 50,304 assumed: data/mine/meta.pkl is not here"],
            absent_text=["on fewer tokens"],
        ),
    ),
    "a size that some vocabulary gives": (
        "# 10M parameters\ndataset = 'mine'\n" + SMALL,
        None,
        dict(absent={"param_count_mismatch"}),
    ),
    "a size that none gives": (
        "# 350M parameters\ndataset = 'mine'\n" + SMALL,
        None,
        dict(critical={"param_count_mismatch"}, text=["assumed"]),
    ),
    "characters": (
        "dataset = 'shakespeare_char'\n" + SMALL,
        None,
        dict(figures={"parameters": 10_646_784}, absent={"few", "many"}, text=["outside of their range"]),
    ),
    "the log's count tells it": (
        "dataset = 'mine'\n" + SMALL,
        "number of parameters: 10.65M\n" + steps(),
        dict(absent_text=["assumed"], figures={"parameters": 10_650_000}),
    ),
    "the log says it": (
        "dataset = 'mine'\n" + SMALL,
        "found vocab_size = 65 (inside data/mine/meta.pkl)\n" + steps(),
        dict(absent_text=["assumed"]),
    ),
    # --- log and config disagree ---
    "edited after the run": (
        BIG,
        steps(mfu=mfu(300e6 * 524_288, 2000), loss=10.9),
        dict(
            gpu="h100",
            found={"config_log_mismatch"},
            absent={"other_card"},
            figures={"model_tflops": 78.66, "parameters": None},
            text=["300 MFLOP per token, the config 855"],
        ),
    ),
    "an excerpt of a shorter accumulation": (
        "gradient_accumulation_steps = 64\ndtype = 'float16'\nbatch_size = 8\n",
        steps(20, start=5000, mfu=mfu(GPT2 / 8, 1000), first=mfu(GPT2 / 8, 1000), ms=1000)
        + "iter 5200: loss nan, time 1000.00ms, mfu 10.00%\n",
        dict(
            gpu="v100",
            critical={"nan"},
            absent={"other_card"},
            found={"config_log_mismatch"},
            absent_text=["bfloat16'"],
            figures={"tokens_per_step": 65_536, "model_tflops": 56.0},
            text=["65,536 tokens per step (accumulation 8), the config 524,288"],
        ),
    ),
    "eight GPUs": (
        BIG,
        "tokens per iteration will be: 524,288\n" + steps(mfu=mfu(GPT2 / 8, 2000)),
        dict(gpu="a100", figures={"gpus": 8, "tokens_per_step": 524_288}, absent={"config_log_mismatch"}),
    ),
    "an excerpt whose mean still moves": (
        BIG,
        "".join(f"iter {i}00: loss 4.0000, time 9000.00ms, mfu {10 + i % 5 * 0.4:.2f}%\n" for i in range(1, 30)),
        dict(gpu="rtx4070", absent={"config_log_mismatch", "other_card"}, figures={"mfu_nanogpt": 0.1595}),
    ),
    "an mfu of one digit": (
        SMALL + "dataset = 'shakespeare_char'\n",
        steps(ms=3000, mfu="0.04", loss=4.2),
        dict(absent={"config_log_mismatch"}, figures={"parameters": 10_646_784, "flops_per_step_logged": None}),
    ),
    "longer than the config": (
        BIG + "max_iters = 100\nlr_decay_iters = 100\nwarmup_iters = 5\n",
        steps(),
        dict(found={"config_log_mismatch"}, text=["max_iters 100 in the config"]),
    ),
    # --- other programs ---
    "build-nanogpt": (
        None,
        "total desired batch size: 524288\nvalidation loss: 10.9505\n"
        + "".join(
            f"step {i:5d} | loss: {10.9 - i:.6f} | lr 8.4e-07 | norm: 15.2 | dt: 9645.11ms | tok/sec: 54357.00\n"
            for i in range(4)
        ),
        dict(code=0, figures={"tokens_per_step": 524_288, "steady_ms_per_iter": 9645.11, "best_val": 10.9505}),
    ),
    "build-nanogpt with commas, then NaN": (
        None,
        "step 0, loss: 10.9, dt: 96.11ms, tok/sec: 5435.71\nstep 1, loss: nan, dt: 96.11ms, tok/sec: 5435.71\n",
        dict(critical={"nan"}),
    ),
    "build-nanogpt's log.txt": (
        None,
        "0 val 10.9505\n0 hella 0.2463\n" + "".join(f"{i} train {10.9 - i:.6f}\n" for i in range(5)) + "5 val 5.4321\n",
        dict(code=0, figures={"steps_seen": 5, "best_val": 5.4321}),
    ),
    "nanoGPT without mfu": (
        None,
        "".join(f"iter {i}: loss {9 - i / 10:.4f}, time 250.00ms\n" for i in range(9)),
        dict(code=0, figures={"steps_seen": 8, "steady_ms_per_iter": 250}),
    ),
    "llama2.c": (
        None,
        "".join(f"{i} | loss {9 - i / 100:.4f} | lr 4.900000e-05 | 8060.78ms | mfu 0.21%\n" for i in range(0, 50, 10)),
        dict(figures={"steps_seen": 40, "mfu_printed_last": 0.0021}),
    ),
    "modded-nanogpt": (
        None,
        "step:0/1750 val_loss:10.8258 train_time:0ms step_avg:nanms\n"
        + "".join(f"step:{i}/1750 train_time:{i * 141}ms step_avg:141.02ms\n" for i in range(1, 9))
        + "step:9/1750 val_loss:7.1258 train_time:1269ms step_avg:141.02ms\n",
        dict(code=0, figures={"steps_seen": 9, "best_val": 7.1258, "steady_ms_per_iter": 141.02}),
    ),
    "an older modded-nanogpt": (
        None,
        "".join(f"step:{i}/9 train_loss:{9 - i}.1234 train_time:{i}ms step_avg:14.02ms\n" for i in range(1, 5)),
        dict(code=0, figures={"steps_seen": 4}),
    ),
    "litgpt": (
        None,
        "Total parameters: 124,439,808\n"
        + "".join(
            f"Epoch 1 | iter {4 * i} step {i} | loss train: {9 - i}.123, val: n/a | iter time: 123.45 ms (step) remaining\n"
            for i in range(1, 5)
        )
        + "iter 16: val loss 5.1234, val time: 1000.00 ms\n",
        dict(code=0, figures={"steps_seen": 4, "best_val": 5.1234, "parameters": 124_439_808}),
    ),
    "TinyLlama": (
        None,
        "".join(
            f"iter {2 * i} step {i}: loss {9 - i}.1234, iter time: 99.00ms (optimizer.step)\n" for i in range(1, 5)
        ),
        dict(code=0, figures={"steps_seen": 4}),
    ),
    "llm.c on a card that it does not know": (
        None,
        "| device                | NVIDIA GeForce RTX 5090                 |\nnum_parameters: 124475904 => bytes: 248951808\n"
        + "".join(
            f"step {i:4d}/90 | loss 9.0 (+nanz)| norm 2.1 (+nanz)| lr 8.57e-07 | {ms} ms | -100.0% bf16 MFU | {rate} tok/s\n"
            for i, ms, rate in ((1, 4688.25, 111830), (2, 4340.91, 124285), (3, 4339.91, 124285))
        ),
        dict(found={"mfu_not_measured"}, figures={"tokens_per_step": 524_288, "parameters": 124_475_904}),
    ),
    "nanochat on a card that it does not know": (
        None,
        "Estimated FLOPs per token: 8.0e+08\nTokens / micro-batch / rank: 32 x 2048 = 65,536\nTokens / micro-batch: 131,072\n"
        "Total batch size 524,288 => gradient accumulation steps: 4\nStep 00000 | Validation bpb: 3.1\n"
        "Step 00002 | Validation bpb: 2.1\n"
        + "".join(
            f"step 0000{i}/02520 (0.04%) | loss: 9.1 | lrm: 1.00 | dt: 5000.00ms | tok/sec: 104,857 | bf16_mfu: 0.00 | total\n"
            for i in range(3)
        ),
        dict(gpu="rtx4090", found={"mfu_not_measured"}, figures={"gpus": 2, "model_tflops": 41.943, "last_bpb": 2.1}),
    ),
    "nanochat on GPUs of which the log does not say how many": (
        None,
        "Estimated FLOPs per token: 8.0e+08\nTotal batch size 524,288 => gradient accumulation steps: 1\n"
        + "".join(
            f"step 0000{i}/02520 (0.04%) | loss: 9.1 | lrm: 1.00 | dt: 100.00ms | tok/sec: 5,242,880 | mfu: 53.0 | total\n"
            for i in range(3)
        ),
        dict(figures={"mfu_nanogpt": None, "gpus": None}, text=["MFU: 4,194 TFLOP/s are of several GPUs"]),
    ),
    "bits per byte alone": (
        None,
        "Step 00000 | Validation bpb: 3.1\nStep 00250 | Validation bpb: 1.1234\n",
        dict(code=0, figures={"last_bpb": 1.1234}),
    ),
    "Docker's lines": (
        None,
        "".join(
            json.dumps({"log": line + "\n", "stream": "stdout", "time": "2025-01-01T00:00:00Z"}) + "\n"
            for line in steps().splitlines()
        ),
        dict(figures={"steps_seen": 290, "steady_ms_per_iter": 2000.0}),
    ),
    "decimal commas": (
        None,
        "".join(line.replace(", ", "; ").replace(".", ",").replace("; ", ", ") + "\n" for line in steps().splitlines()),
        dict(figures={"steps_seen": 290, "steady_ms_per_iter": 2000.0}),
    ),
    "two runs in one file": (
        None,
        steps(20) + "iter 200: loss nan, time 2000.00ms, mfu 1.00%\n" + steps(15, loss=9.0),
        dict(absent={"nan"}, text=["2 runs"], figures={"steps_seen": 140}),
    ),
    "a Trainer's dictionaries": (
        None,
        "{'loss': 2.1, 'learning_rate': 5e-05, 'epoch': 0.1}\n" * 3,
        dict(code=2, text=["3 lines look like steps and could not be read"]),
    ),
    "lines of no known program": (
        None,
        "Step 3 - training loss 2.31\nStep 4 - training loss 2.30\n",
        dict(code=2, text=["2 lines look like steps"]),
    ),
    "such lines before a crash": (
        None,
        "[batch 10] loss=3.1\n[batch 20] loss=3.0\nRuntimeError: CUDA error: an illegal memory access was encountered\n",
        dict(code=2, critical={"bad_memory_access"}, text=["look like steps"]),
    ),
    "another program's run behind a nanoGPT's": (
        None,
        steps(12)
        + "".join(
            f"step {i:4d}/90 | loss 9.0 (+nanz)| norm 2.1 (+nanz)| lr 8.57e-07 | 3056.36 ms | 42.6% bf16 MFU | 171540 tok/s\n"
            for i in range(1, 20)
        ),
        dict(gpu="rtx4070", absent={"other_card"}, text=["2 runs"], figures={"tokens_per_step": 524_288}),
    ),
    "a Trainer's dictionaries behind its progress": (
        None,
        "\r  1%|#    | 3/100 [00:03<01:00,  1.5it/s]{'loss': 2.1, 'epoch': 0.1}\n" * 3,
        dict(code=2, text=["3 lines look like steps and could not be read"]),
    ),
    "names of a tracker": (
        None,
        '{"_step": 1, "train/loss": 9.1}\n{"_step": 2, "train/loss": 9.0}\n',
        dict(code=2, text=["2 lines look like steps and could not be read"]),
    ),
    "torchtitan": (
        None,
        "[rank0]:[titan] 2025-01-01 12:00:00,123 - root - INFO - step:  1  loss: 12.2  memory: 42.91GiB(45%)  tps: 1,234\n"
        * 2,
        dict(code=2, text=["2 lines look like steps and could not be read"]),
    ),
    # --- ends ---
    "an assertion of the embedding, and no exception": (
        None,
        ENDED + "Indexing.cu:1290: block: [1,0,0], thread: [1,0,0] Assertion `srcIndex < srcSelectDimSize` failed.\n",
        dict(critical={"token_beyond_vocabulary"}),
    ),
    "a token beyond the vocabulary": (
        None,
        ENDED + "RuntimeError: CUDA error: device-side assert triggered\n",
        dict(critical={"token_beyond_vocabulary"}, text=["fastgpt.data check"]),
    ),
    "Windows": (
        None,
        COUNTED + "RuntimeError: Windows not yet supported for torch.compile\n",
        dict(critical={"no_compile_here"}, text=["triton-windows"]),
    ),
    "a fork that ran out of memory, by its log": (
        None,
        "Overriding config with a.py:\nn_layer = 6\nn_exp = 8\nbatch_size = 4\n\nOverriding: top_k = 2\n"
        "tokens per iteration will be: 40,960\nnumber of parameters: 220.10M\nCUDA out of memory.\n",
        dict(
            critical={"out_of_memory"},
            absent={"config_log_mismatch"},
            text=["setting n_exp, top_k", "batch_size = 2\\ngradient_accumulation_steps = 20"],
            absent_text=["stops at it"],
        ),
    ),
    "out of memory before the first step": (
        None,
        COUNTED + "torch.cuda.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.30 GiB\n",
        dict(critical={"out_of_memory"}, text=["Half the batch_size at twice the gradient_accumulation_steps"]),
    ),
    "no data": (
        None,
        "Traceback (most recent call last):\nFileNotFoundError: [Errno 2] No such file or directory: 'data/x/train.bin'\n",
        dict(critical={"data_missing"}, text=["prepare.py"]),
    ),
    "a full disk": (
        None,
        ENDED + "RuntimeError: [enforce fail] . PytorchStreamWriter failed writing file data/1\n",
        dict(critical={"disk_full"}),
    ),
    "a checkpoint of another shape": (
        None,
        COUNTED + "RuntimeError: Error(s) in loading state_dict for GPT:\n",
        dict(critical={"another_shape"}),
    ),
    "a lost rank": (
        None,
        ENDED + "[rank1]: torch.distributed.DistBackendError: NCCL error in: a.cpp:1\n",
        dict(critical={"rank_lost"}),
    ),
    "a rank that waited for another": (
        None,
        ENDED
        + "[rank3]:[E1130 10:20:30.1 ProcessGroupNCCL.cpp:629] [Rank 3] Watchdog caught collective operation timeout: "
        "WorkNCCL(SeqNum=7) ran for 600009 milliseconds before timing out.\n"
        "terminate called after throwing an instance of 'c10::DistBackendError'\n",
        dict(critical={"rank_lost"}),
    ),
    "killed": (None, ENDED + "Killed\n", dict(critical={"host_memory"})),
    "a package": (
        None,
        "ModuleNotFoundError: No module named 'tiktoken'\n",
        dict(critical={"module_missing"}, text=["tiktoken"]),
    ),
    "an exception of no known kind": (
        None,
        ENDED + "Traceback (most recent call last):\nKeyError: 'stoi'\n",
        dict(critical={"exception"}, text=["KeyError: 'stoi'"]),
    ),
    "stopped by hand": (None, ENDED + "KeyboardInterrupt\n", dict(found={"stopped_by_hand"})),
    "the queue's limit": (
        None,
        ENDED + "slurmstepd: error: *** JOB 1 ON n1 CANCELLED AT 2025-01-01T00:00:00 DUE TO TIME LIMIT ***\n",
        dict(found={"time_limit"}),
    ),
    "an exception that it survived": (None, COUNTED + "ValueError: retrying\n" + steps(12), dict(absent={"exception"})),
    "NaN in fp16, the card not known": (
        "dtype = 'float16'\n" + BIG,
        steps(5) + "iter 50: loss nan, time 2000.00ms, mfu 1.00%\n",
        dict(critical={"nan"}, text=["if the card has it"]),
    ),
    "memorised": (
        "dataset = 'shakespeare_char'\ndropout = 0.2\n" + SMALL,
        "number of parameters: 10.65M\nstep 0: train loss 4.2874, val loss 4.2823\n"
        + steps(20, loss=4.26, mfu="-100.00")
        + "step 5000: train loss 0.6166, val loss 1.7099\n",
        dict(found={"memorised"}, text=["82 epochs"]),
    ),
    # --- advice that can be followed ---
    "evaluations that are many": (
        "dataset = 'openwebtext'\n" + SMALL + "eval_interval = 2000\neval_iters = 200\n",
        None,
        dict(found={"evaluation_time"}, text=["eval_iters = 1"], absent_text=["eval_interval = "]),
    ),
    "a size that no 4070 holds": (
        "# a 3B model\n" + BIG,
        None,
        dict(gpu="rtx4070", critical={"param_count_mismatch"}, absent_text=["n_embd =", "n_layer ="]),
    ),
    "a faster card than the one named": (
        BIG,
        steps(mfu=mfu(GPT2, 500), ms=500),
        dict(gpu="h200", absent={"other_card"}, absent_text=["--gpu h100"]),
    ),
    # --- claims of a size that rest on less than the config ---
    "a resumed run without its checkpoint": (
        "# the 350M model goes on\ninit_from = 'resume'\nmax_iters = 50000\nlr_decay_iters = 50000\n",
        None,
        dict(sure={"param_count_mismatch": "possible"}, text=["init_from = 'resume' takes it from the checkpoint"]),
    ),
    "a shape in a dict that is not read": (
        "# 1.3B parameters\nmodel_config = {'n_layer': 24, 'd_model': 2048}\nmax_iters = 9000\nlr_decay_iters = 9000\n",
        None,
        dict(found={"unknown_settings"}, absent={"param_count_mismatch", "many"}, figures={"parameters": None}),
    ),
    "a shape in a call that is not read": (
        "# 1.3B parameters\nargs = ModelArgs(n_layer=24, n_embd=2048)\nmax_iters = 9000\nlr_decay_iters = 9000\n",
        None,
        dict(found={"unknown_settings"}, absent={"param_count_mismatch", "many"}, figures={"parameters": None}),
    ),
    "weights of another model": (
        "# the 1.3B model\ninit_from = 'facebook/opt-1.3b'\n" + BIG,
        None,
        dict(sure={"param_count_mismatch": "possible"}, text=["init_from = 'facebook/opt-1.3b' may bring its own"]),
    ),
    "a llama2.c config": (
        "dim = 288\nn_layers = 6\nn_heads = 6\nvocab_source = 'llama2'\n# a 15M model\nmax_iters = 100000\n",
        None,
        dict(found={"unknown_settings"}, figures={"parameters": None}, absent_text=["did you mean"]),
    ),
    "two names, one of them right": (
        "wandb_run_name = 'gpt2-124M-distilled'\nout_dir = 'out-350M-teacher'\n" + BIG,
        None,
        dict(sure={"param_count_mismatch": "possible"}),
    ),
    "a rate that does not decay needs no end of its decay": (
        "decay_lr = False\nmax_iters = 1000\n",
        None,
        dict(found={"few"}, absent_text=["lr_decay_iters"]),
    ),
    # --- its own runs ---
    "metrics of its own": (
        None,
        json.dumps(
            {
                "config": {
                    "model": {"n_layer": 2},
                    "data": {"data": "x"},
                    "optim": {},
                    "train": {"init_from": None, "resume": None, "device": "cpu"},
                }
            }
        )
        + "\n"
        + "".join(
            json.dumps(
                {
                    "step": i,
                    "loss": 10.8 - i / 20,
                    "ms": 10.0 + 9 * (i % 10 == 0),
                    "tokens_per_second": 100.0,
                    "lr": 1e-3,
                }
            )
            + "\n"
            for i in range(1, 60)
        ),
        dict(absent_text=["could not be read", "init_from", "None batches", "train.bin on", "e+0", "0.0000"]),
    ),
    "a config of its own": (None, OURS, dict(absent_text=["None", "could not be read"])),
}


@pytest.mark.parametrize("name", CASES)
def test_what_the_doctor_says(name, tmp_path, monkeypatch, capsys):
    config, log, right = CASES[name]
    monkeypatch.chdir(tmp_path)
    files = []
    for file, text in (("config.py", config), ("run.log", log)):
        if text is not None:
            (tmp_path / file).write_text(text)
            files.append(file)
    code = doctor.main([*files, "--json", *(["--gpu", right["gpu"]] if "gpu" in right else [])])
    said = json.loads(capsys.readouterr().out)
    found = {finding["check"]: finding for finding in said["findings"]}
    told = json.dumps({key: said[key] for key in ("findings", "assumed", "not_checked", "unread")}, ensure_ascii=False)
    advice = "\n".join(finding["advice"] for finding in found.values())
    assert {check for check, finding in found.items() if finding["severity"] == "critical"} == right.get(
        "critical", set()
    )
    assert right.get("found", set()) <= set(found) and not right.get("absent", set()) & set(found)
    assert code == right.get("code", code)
    assert {check: found[check]["confidence"] for check in right.get("sure", ())} == right.get("sure", {})
    for figure, value in right.get("figures", {}).items():
        assert said["figures"][figure] == (value if value is None else pytest.approx(value, rel=1e-3)), figure
    assert all(text in told for text in right.get("text", ()))
    assert not any(text in advice + json.dumps(said["unread"]) for text in right.get("absent_text", ()))


def test_a_vocabulary_beside_the_data_is_read_and_its_pickle_is_not_run(tmp_path, monkeypatch, capsys):
    class Code:
        def __reduce__(self):
            return open, (str(tmp_path / "canary"), "w")

    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "mine").mkdir(parents=True)
    (tmp_path / "config.py").write_text("dataset = 'mine'\n" + SMALL)
    for content, parameters in (
        ({"vocab_size": 65, "itos": {0: "a"}}, 10_646_784),
        ({"x": Code(), "vocab_size": 80}, 10_652_544),
    ):
        (tmp_path / "data" / "mine" / "meta.pkl").write_bytes(pickle.dumps(content))
        doctor.main(["config.py", "--json"])
        said = json.loads(capsys.readouterr().out)
        assert said["figures"]["parameters"] == parameters and not said["assumed"]
        assert said["sources"]["parameters"] == ["config", "data", "default"]
    assert not (tmp_path / "canary").exists()


def test_a_checkpoint_without_settings_is_held_against_nothing_and_its_nan_is_found(tmp_path, capsys):
    tensors = {"transformer.wte.weight": torch.zeros(512, 64), "transformer.wpe.weight": torch.zeros(64, 64)}
    tensors |= {f"transformer.h.{i}.attn.c_attn.weight": torch.full((192, 64), float("nan")) for i in range(2)}
    args = dict(n_layer=2, n_head=2, n_embd=64, block_size=64, bias=False, vocab_size=512)
    torch.save({"model": tensors, "model_args": args, "iter_num": torch.tensor(10), "config": {}}, tmp_path / "ckpt.pt")
    assert doctor.main([str(tmp_path / "ckpt.pt"), "--json"]) == 1
    said = json.loads(capsys.readouterr().out)
    assert [finding["check"] for finding in said["findings"]] == ["weights_not_finite"]
    assert (
        said["figures"]["tokens_per_parameter"] is None
        and "h.0.attn.c_attn" in said["findings"][0]["evidence"][0]["text"]
    )


def test_every_source_is_named(tmp_path, monkeypatch, capsys):
    """log, config, override, default, assumption: each figure says of which it is made."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.py").write_text("dataset = 'mine'\nn_layer = 6\n")
    (tmp_path / "run.log").write_text(steps())
    doctor.main(["config.py", "run.log", "--max_iters=10", "--json"])
    sources = json.loads(capsys.readouterr().out)["sources"]
    assert sources["tokens_planned"] == ["default", "override"] and sources["steady_ms_per_iter"] == ["log"]
    assert sources["parameters"] == ["assumption", "config", "default"]
