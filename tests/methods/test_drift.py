"""Weights that follow the drift of their inputs: GPTQ's options against the paper of Qronos, and what following gives
back."""

import pytest
import torch

from kernels.formats.layer import LayerConfig, LayerSpec
from methods import parse_method
from methods.base import LayerData
from methods.codecs.grids import fit_grid

DAMP = 0.02


@pytest.fixture(scope="module")
def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    """(x, x') [N, I]: behind the packed prefix, and of the uncompressed model."""
    generator = torch.Generator().manual_seed(1)
    clean = torch.randn(200, 12, generator=generator) @ torch.randn(12, 12, generator=generator)
    return clean @ (torch.eye(12) + 0.1 * torch.randn(12, 12, generator=generator)), clean


@pytest.fixture(scope="module")
def weight() -> torch.Tensor:
    return torch.randn(6, 12, generator=torch.Generator().manual_seed(2))


def packed(method: str, weight: torch.Tensor, inputs: tuple[torch.Tensor, torch.Tensor], **values) -> torch.Tensor:
    x, clean = inputs
    layer = LayerSpec("layer", "layer", *weight.shape, bias=False)
    data = LayerData(weight, hessian_II=x.T @ x, drift_II=(clean - x).T @ x)
    parsed = parse_method(method)
    config = LayerConfig.of("uniform", bits=3, group=12, offset="symmetric", permuted=False)
    if values:
        config = LayerConfig.of("codebook", **values)
    return parsed.compress(data, layer, config).packed.decode()


def qronos(weight, inputs, damp, grid) -> torch.Tensor:
    """The paper's sec. 3 as it is written, in fp64, by a least-squares problem for each of its steps. Damping is rows
    of sqrt(lambda) I below either kind of inputs."""
    x, clean = (matrix.double() for matrix in inputs)
    size = x.shape[1]
    rows = (damp * x.square().sum(dim=0).mean()).sqrt() * torch.eye(size, dtype=torch.float64)
    order = x.square().sum(dim=0).argsort(descending=True).tolist()
    x, clean = (torch.cat([matrix, rows])[:, order] for matrix in (x, clean))
    scale, base = grid.scale_OG.double(), grid.base_OG.double()
    found = torch.empty(weight.shape, dtype=torch.float64)
    for row, original in enumerate(weight.double()[:, order]):
        aim, w = clean @ original, original.clone()
        for t in range(size):
            rest = aim - x @ w + x[:, t] * w[t]
            best = x[:, t] @ rest / (x[:, t] @ x[:, t])
            w[t] = ((best - base[row, 0]) / scale[row, 0]).round().clamp(0, 7) * scale[row, 0] + base[row, 0]
            if t + 1 < size:
                rest = aim - x[:, : t + 1] @ w[: t + 1]
                w[t + 1 :] = torch.linalg.lstsq(x[:, t + 1 :], rest[:, None]).solution[:, 0]
        found[row, order] = w
    return found


def test_qronos_is_the_papers(weight, inputs, monkeypatch):
    """Its grids are given, so ours are placed on the original weights here."""
    grid = fit_grid(weight, bits=3, group=12, offset="symmetric")
    monkeypatch.setattr("methods.gptq.fit_grid", lambda *_, **__: grid)
    options = f"grid=minmax,damp={DAMP},follow_damp={DAMP},shrink=0"
    found = packed(f"gptq:qronos,follow=1,{options}", weight, inputs)
    assert torch.allclose(found.double(), qronos(weight, inputs, DAMP, grid), atol=1e-4)
    # With the first column rounded where it is best anyway, it is another algorithm, but hardly.
    other = packed(f"gptq:follow=1,{options}", weight, inputs)
    assert 0 < (other != found).float().mean() < 0.5


@pytest.mark.parametrize("method", ["gptq:qronos", "gptq:follow=0.5", "gptq:qronos,static_groups=false"])
def test_without_drift_it_is_gptq(method, weight, inputs):
    x, _ = inputs
    plain = method.replace("qronos", "follow=0").replace("follow=0.5", "follow=0")
    assert torch.equal(packed(method, weight, (x, x)), packed(plain, weight, (x, x)))


@pytest.mark.parametrize(
    "method", ["gptq:follow={},shrink=0", "gptq:follow={},static_groups=false,shrink=0", "gptvq:follow={},shrink=0"]
)
def test_following_gives_back_outputs(method, weight, inputs):
    values = dict(dim=1, index_bits=4, block=12, scales="half") if method.startswith("gptvq") else {}
    x, clean = inputs
    shares = (0, 0.5, 1)
    weights = [packed(method.format(share), weight, inputs, **values) for share in shares]
    errors = [float((clean @ weight.T - x @ decoded.T).square().mean()) for decoded in weights]
    assert errors[0] > errors[1] > errors[2], errors


def test_what_is_asked_of_the_harness():
    for method in ("gptq", "gptvq"):
        assert not parse_method(f"{method}:follow=0").needs.drift and parse_method(f"{method}:follow=0.5").needs.drift
    sequential = parse_method("gptq:follow=0.5,true_sequential=false").needs
    assert sequential.drift and not sequential.true_sequential
    for text, words in (("gptq:qronos=true,follow=0", "write follow=1"), ("gptvq:follow=2", "0 to 1")):
        with pytest.raises(ValueError, match=words):
            parse_method(text)
