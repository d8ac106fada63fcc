"""The table against NVIDIA's published dense figures, names against torch's."""

from __future__ import annotations

import json
import subprocess
import sys
import types

import pytest
import torch

from fastgpt import common
from fastgpt.hardware import __main__
from fastgpt.hardware import cards as cards_module
from fastgpt.hardware.cards import ARITHMETICS, GPUS, lookup

# TFLOP/s, dense, as printed by NVIDIA: whitepaper appendices where a card is in one, else the datasheet (a sparse
# figure halved). Order: bf16, fp16, fp16 accumulating in fp16, fp8, fp8 accumulating in fp16, tf32, fp32.
PUBLISHED = {
    "NVIDIA GeForce RTX 4090": (165.2, 165.2, 330.3, 330.3, 660.6, 82.6, 82.6),
    "NVIDIA GeForce RTX 4080": (97.5, 97.5, 194.9, 194.9, 389.9, 48.7, 48.7),
    "NVIDIA GeForce RTX 3090": (71, 71, 142, None, None, 35.6, 35.6),
    "NVIDIA GeForce RTX 3080": (59.5, 59.5, 119, None, None, 29.8, 29.8),
    "NVIDIA GeForce RTX 3070": (40.6, 40.6, 81.3, None, None, 20.3, 20.3),
    "NVIDIA GeForce RTX 5090": (209.5, 209.5, 419, 419, 838, 104.8, 104.8),
    "NVIDIA GeForce RTX 5080": (112.6, 112.6, 225.1, 225.1, 450.2, 56.3, 56.3),
    "NVIDIA RTX A6000": (154.8, 154.8, 154.8, None, None, 77.4, 38.7),
    "NVIDIA RTX A5000": (111.1, 111.1, 111.1, None, None, 55.6, 27.8),
    "NVIDIA RTX A4000": (76.7, 76.7, 76.7, None, None, 38.3, 19.2),
    "NVIDIA A40": (149.7, 149.7, 149.7, None, None, 74.8, 37.4),
    "NVIDIA A10": (125, 125, 125, None, None, 62.5, 31.2),
    # The datasheet prints 362.05 dense beside 733 sparse; 733 / 2 = 366.5 is what 142 SMs at its own fp32 clock give.
    "NVIDIA L40S": (733 / 2, 733 / 2, None, 1466 / 2, None, 366 / 2, 91.6),
    "NVIDIA L4": (242 / 2, 242 / 2, None, 485 / 2, None, 120 / 2, 30.3),
    "NVIDIA RTX 6000 Ada Generation": (None, None, None, 1457 / 2, None, None, 91.1),
    "NVIDIA A100-SXM4-80GB": (312, 312, 312, None, None, 156, 19.5),
    "NVIDIA A100-PCIE-40GB": (312, 312, 312, None, None, 156, 19.5),
    "NVIDIA A30": (165, 165, 165, None, None, 82, 10.3),
    "NVIDIA H100 80GB HBM3": (989.4, 989.4, 989.4, 1978.9, 1978.9, 494.7, 66.9),
    "NVIDIA H100 PCIe": (756, 756, 756, 1513, 1513, 378, 51.2),
    "NVIDIA H100 NVL": (1671 / 2, 1671 / 2, None, 3341 / 2, None, 835 / 2, 60),
    "NVIDIA H200": (989.4, 989.4, 989.4, 1978.9, 1978.9, 494.7, 66.9),
    "Tesla V100-SXM2-16GB": (None, 125, None, None, None, None, 15.7),
    "Tesla T4": (None, 65, None, None, None, None, 8.1),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_dense_peaks_are_the_published_ones(name):
    gpu = lookup(name)
    for arithmetic, published in zip(ARITHMETICS, PUBLISHED[name]):
        if published is not None:  # printed with two to four digits
            assert gpu.peak_flops(arithmetic) / 1e12 == pytest.approx(published, rel=0.01), arithmetic


# FLOP per clock per SM, written out again: bf16, fp16, fp16acc, fp8, fp8 with fp16acc, tf32, fp32.
PER_CLOCK = {
    ("sm_70", True): (None, 1024, 1024, None, None, None, 128),
    ("sm_75", True): (None, 1024, 1024, None, None, None, 128),
    ("sm_80", True): (2048, 2048, 2048, None, None, 1024, 128),
    ("sm_86", True): (1024, 1024, 1024, None, None, 512, 256),
    ("sm_86", False): (512, 512, 1024, None, None, 256, 256),
    ("sm_89", True): (1024, 1024, 1024, 2048, 2048, 512, 256),
    ("sm_89", False): (512, 512, 1024, 1024, 2048, 256, 256),
    ("sm_90", True): (4096, 4096, 4096, 8192, 8192, 2048, 256),
    ("sm_120", False): (512, 512, 1024, 1024, 2048, 256, 256),
}


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: f"{gpu.name}-{gpu.sm_count}-{gpu.vram_gb}")
def test_every_entry_is_sms_times_clock_times_rate(gpu):
    assert gpu.full_rate == ("GeForce" not in gpu.name)
    assert "NVIDIA" in gpu.source
    for arithmetic, rate in zip(ARITHMETICS, PER_CLOCK[gpu.arch, gpu.full_rate]):
        mhz = (gpu.fp32_mhz or gpu.boost_mhz) if arithmetic == "fp32" else gpu.boost_mhz
        expected = None if rate is None else gpu.sm_count * mhz * 1e6 * rate
        assert gpu.peak_flops(arithmetic) == expected
    assert 0 < gpu.l2_mb < gpu.vram_gb * 1024 and 100 < gpu.memory_gbs < 5000 and 50 < gpu.power_w < 800


# NVIDIA's "AI TOPS" of a GeForce card: sparse fp8 of the 40 series, sparse fp4 of the 50 series, fp16 accumulation.
AI_TOPS = {
    "rtx4090": 1321,
    "rtx4090d": 1177,
    "rtx4080super": 836,
    "rtx4080": 780,
    "rtx4070tisuper": 706,
    "rtx4070ti": 641,
    "rtx4070super": 568,
    "rtx4070": 466,
    "rtx4060ti": 353,
    "rtx4060": 242,
    "rtx4080laptop": 542,
    "rtx4070laptop": 321,
    "rtx4060laptop": 233,
    "rtx5090": 3352,
    "rtx5080": 1801,
    "rtx5070ti": 1406,
    "rtx5070": 988,
    "rtx5060ti": 759,
    "rtx5060": 614,
}


@pytest.mark.parametrize("name", AI_TOPS)
def test_dense_fp8_is_the_published_ai_tops_without_sparsity(name):
    gpu = lookup(name)
    of_dense_fp8 = 4 if gpu.arch == "sm_120" else 2
    assert of_dense_fp8 * gpu.peak_flops("fp8_fp16acc") / 1e12 == pytest.approx(AI_TOPS[name], abs=1.0)


def test_rtx_4070():
    peaks = [round(lookup("rtx4070").peak_flops(arithmetic) / 1e12, 1) for arithmetic in ARITHMETICS]
    assert peaks == [58.3, 58.3, 116.6, 116.6, 233.2, 29.1, 29.1]


def test_ada_sm_limits():
    chip = lookup("rtx4070").chip
    assert (chip.shared_per_block, chip.registers, chip.max_warps, chip.max_blocks) == (101_376, 65_536, 48, 24)


def test_names_match_whole():
    names = ("", " Ti", " Ti SUPER", " SUPER", " Laptop GPU")
    cards = [lookup("NVIDIA GeForce RTX 4070" + suffix) for suffix in names]
    assert [card.sm_count for card in cards] == [46, 60, 66, 56, 36]
    assert len({lookup(n).sm_count * lookup(n).boost_mhz for n in ("h100 80gb hbm3", "h100 pcie", "h100 nvl")}) == 3


@pytest.mark.parametrize(
    "unknown",
    [
        "NVIDIA GeForce RTX 4070 Ti SUPER OC",
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "NVIDIA H100",
        "NVIDIA A100",
        "NVIDIA B200",
        "NVIDIA GeForce GTX 1080 Ti",
        "AMD Instinct MI300X",
        "rtx407",
        "",
    ],
)
def test_unknown_cards_are_none(unknown):
    assert lookup(unknown) is None


def test_short_forms():
    for typed, name in {
        "rtx4070": "NVIDIA GeForce RTX 4070",
        "4070": "NVIDIA GeForce RTX 4070",
        "RTX 4070 Ti SUPER": "NVIDIA GeForce RTX 4070 Ti SUPER",
        "rtx4070-laptop": "NVIDIA GeForce RTX 4070 Laptop GPU",
        "geforce rtx 3090": "NVIDIA GeForce RTX 3090",
        "h100": "NVIDIA H100 80GB HBM3",
        "H100-PCIe": "NVIDIA H100 PCIe",
        "h200": "NVIDIA H200",
        "a100": "NVIDIA A100-SXM4-80GB",
        "a6000": "NVIDIA RTX A6000",
        "l40s": "NVIDIA L40S",
        "t4": "Tesla T4",
    }.items():
        assert lookup(typed).name == name


def test_no_short_form_means_two_cards():
    owners = {}
    for gpu in GPUS:
        for short in cards_module._short_names(gpu):
            assert owners.setdefault(short, gpu.name) == gpu.name, short


def test_cards_that_share_a_name_are_told_apart():
    name = "NVIDIA GeForce RTX 3080"
    assert lookup(name, sm_count=70).memory_gbs == 912.4
    assert lookup(name, sm_count=68).vram_gb == 10
    assert lookup(name, sm_count=69) is None
    assert lookup("NVIDIA GeForce RTX 4060 Ti", sm_count=34, vram_gb=15.7).vram_gb == 16
    assert lookup("NVIDIA GeForce RTX 4060 Ti", sm_count=34, vram_gb=7.6).vram_gb == 8


def test_present_asks_the_device(monkeypatch):
    props = types.SimpleNamespace(name="NVIDIA GeForce RTX 4070", multi_processor_count=46, total_memory=12 * 2**30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: props)
    assert cards_module.peak_flops("cuda", "bf16") == 46 * 512 * 2475e6
    assert cards_module.peak_flops("cuda:0", "fp16-fast") == 46 * 1024 * 2475e6
    assert cards_module.peak_flops("cpu", "bf16") is None
    props.name = "NVIDIA GeForce RTX 9999"
    assert cards_module.peak_flops("cuda", "bf16") is None
    with pytest.raises(ValueError, match="precision is 'int3'"):
        cards_module.peak_flops("cuda", "int3")


def test_30_percent_of_an_a100_is_160_percent_of_a_4070():
    assert 0.30 * 312e12 / lookup("rtx4070").peak_flops("bf16") == pytest.approx(1.60, abs=0.01)


# Command line


def run(capsys, *argv):
    code = __main__.main(argv)
    return code, *capsys.readouterr()


def test_json_of_a_named_card(capsys):
    code, out, err = run(capsys, "rtx4070", "--json")
    assert (code, err) == (0, "")
    card = json.loads(out)
    assert list(card) == [
        *("name", "arch", "sm_count", "boost_mhz", "memory_gbs", "vram_gb", "l2_mb", "dense_tflops", "source")
    ]
    assert (card["arch"], card["sm_count"], card["boost_mhz"], card["memory_gbs"]) == ("sm_89", 46, 2475, 504)
    assert list(card["dense_tflops"].values()) == [58.3, 58.3, 116.6, 116.6, 233.2, 29.1, 29.1]
    assert json.loads(run(capsys, "rtx3090", "--json")[1])["dense_tflops"]["fp8"] is None


def test_text_of_a_named_card(capsys):
    code, out, _ = run(capsys, "RTX", "3090")
    assert code == 0
    assert "82 SMs at 1695 MHz" in out and "101,376 bytes" in out and "source: NVIDIA" in out
    assert any(line.split() == ["fp8", "n/a"] for line in out.splitlines())


def refused(capsys, monkeypatch, *argv):
    """The one sentence on standard error."""
    monkeypatch.setattr(sys, "argv", ["hardware", *argv])
    with pytest.raises(SystemExit) as exit:
        common.run(__main__.main)
    out, err = capsys.readouterr()
    assert (exit.value.code, out) == (2, "") and err.startswith("error: ") and err.count("\n") == 1
    return err


def test_unknown_name_exits_2_and_lists_the_nearest(capsys, monkeypatch):
    message = "gpu is 'rtx4071', which is not in the table: nearest are NVIDIA GeForce RTX 4070,"
    assert message in refused(capsys, monkeypatch, "rtx4071", "--json")


def test_without_a_name_and_a_known_card_it_is_refused_as_plan_refuses_it(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for argv in ([], ["--json"]):
        assert "gpu is not given and there is no CUDA GPU here" in refused(capsys, monkeypatch, *argv)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA GeForce RTX 9999")
    monkeypatch.setattr(__main__, "present", lambda: None)
    assert "RTX 9999 is not in the table" in refused(capsys, monkeypatch)


def test_the_list_names_every_card_with_memory_and_peak(capsys, monkeypatch):
    assert __main__.main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(GPUS) and max(map(len, lines)) <= 80
    line = {line.split("  ")[0]: line.split() for line in lines}
    assert line["NVIDIA GeForce RTX 4070"][-6:] == ["sm_89", "12", "GB", "58.3", "TFLOP/s", "bf16"]
    assert line["Tesla T4"][-6:] == ["sm_75", "16", "GB", "65.1", "TFLOP/s", "fp16"]
    assert __main__.main(["--list", "--json"]) == 0
    assert [card["name"] for card in json.loads(capsys.readouterr().out)] == [gpu.name for gpu in GPUS]
    assert "list is for the whole table" in refused(capsys, monkeypatch, "--list", "rtx4070")


def test_entry_point_does_not_import_torch():
    code = "import sys, fastgpt.hardware.__main__ as h; h.main(['rtx4070']); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"


@pytest.mark.parametrize(
    ("printed", "share"), [("12.9", "69.0%"), ("15.4", "82.4%"), ("30", "160.6%"), ("18.7", "100.1%")]
)
def test_nanogpts_mfu_in_the_cards_own_unit(capsys, monkeypatch, printed, share):
    assert __main__.main(["rtx4070", "--nanogpt-mfu", printed]) == 0
    assert f"that is {share} of its dense bf16 peak, 58.3 TFLOP/s" in capsys.readouterr().out
    assert "nanogpt_mfu is -1" in refused(capsys, monkeypatch, "rtx4070", "--nanogpt-mfu", "-1")


# Which precisions pay on which card


@pytest.mark.parametrize(
    ("card", "fast", "fp8"),
    [
        ("rtx4070", True, True),
        ("rtx4060 laptop gpu", True, True),
        ("rtx3090", True, False),
        ("rtx5090", True, True),
        ("a6000", False, False),
        ("rtx6000ada", False, True),
        ("l40s", False, True),
        ("a100", False, False),
        ("h100", False, True),
        ("h200", False, True),
        ("v100", False, False),
        ("t4", False, False),
    ],
)
def test_which_precisions_gain(card, fast, fp8):
    gpu = lookup(card)
    assert (cards_module.gains("fp16-fast", gpu), cards_module.gains("fp8", gpu)) == (fast, fp8)
    assert not any(cards_module.gains(precision, gpu) for precision in ("fp32", "tf32", "bf16", "fp16"))


def test_an_unknown_card_gains_nothing_and_an_unknown_precision_is_refused():
    assert not cards_module.gains("fp16-fast", None) and not cards_module.gains("fp8", lookup("NVIDIA B200"))
    with pytest.raises(ValueError, match="precision is 'int3'"):
        cards_module.gains("int3", None)
