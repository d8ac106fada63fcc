"""A run on the kernels follows the run in plain PyTorch, to within what rounding alone does to a run."""

from bench.training_parity import ALLOWED, measure


def test_200_steps_of_triton_follow_eager(device, capsys):
    parity = measure(200, device)
    with capsys.disabled():
        print(
            f"\n200 steps, triton against eager: {parity.ratio:.2f} envelopes of eager perturbed by 1e-7 (allowed {ALLOWED:g})"
        )
    assert parity.eager[-10:].mean() < parity.eager[:10].mean() - 1.0  # it learns
    assert parity.ratio <= ALLOWED
    assert parity.unmoved == []
