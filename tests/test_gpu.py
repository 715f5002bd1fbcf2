"""What only a GPU can show."""

import pytest
import torch
from torch import nn

from decay_pruning import DepGraph, Pruner, SelfRectifying, SmoothPruning

from .registry import ARMS, batches, build_model, example

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def run_on_gpu(model, optimizer, pruner, steps=40, *, scaler=None, autocast=None, memory_format=None):
    stream = batches(1)
    for _ in range(steps):
        x, y = (t.cuda() for t in next(stream))
        if memory_format is not None:
            x = x.to(memory_format=memory_format)
        optimizer.zero_grad()
        with torch.autocast("cuda", autocast or torch.float16, enabled=autocast is not None):
            loss = nn.functional.cross_entropy(model(x), y)
        if scaler is None:
            loss.backward()
            optimizer.step()
        else:
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
    return pruner.finish()


@pytest.mark.parametrize("model_name", ["residual", "plain", "perceptron"])
@pytest.mark.parametrize("arm", list(ARMS))
@pytest.mark.parametrize("fused", [False, True])
def test_every_arm(model_name, arm, fused):
    model = build_model(model_name).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=fused)
    smooth, rectify = ARMS[arm]
    pruner = Pruner(model, example().cuda(), optimizer, 0.5, smooth=smooth, rectify=rectify)
    report = run_on_gpu(model, optimizer, pruner)
    assert report.macs[1] <= 0.5 * report.macs[0]
    for p in model.parameters():
        assert p.is_cuda and optimizer.state[p]["exp_avg"].shape == p.shape


@pytest.mark.parametrize("fused", [False, True])
def test_half_precision_with_a_scaler(fused):
    model = build_model("residual").cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=fused)
    smooth, rectify = ARMS["sr"]
    pruner = Pruner(model, example().cuda(), optimizer, 0.5, smooth=smooth, rectify=rectify)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**40)  # too large: the first steps are skipped
    report = run_on_gpu(model, optimizer, pruner, scaler=scaler, autocast=torch.float16)
    assert report.macs[1] <= 0.5 * report.macs[0]
    assert pruner.progress().step < 40, "no step was skipped"


def test_channels_last():
    model = build_model("residual").cuda().to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    pruner = Pruner(model, example().cuda(), optimizer, 0.5, smooth=SmoothPruning(steps=3))
    run_on_gpu(model, optimizer, pruner, memory_format=torch.channels_last, autocast=torch.bfloat16)
    assert model.conv3.weight.is_contiguous(memory_format=torch.channels_last)


def test_model_moved_after_the_pruner_was_built():
    model = build_model("residual")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    pruner = Pruner(model, example(), optimizer, 0.5, smooth=SmoothPruning(steps=4), host=DepGraph())
    x, y = next(batches(1))
    nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()
    model.cuda()
    for state in optimizer.state.values():
        state["momentum_buffer"] = state["momentum_buffer"].cuda()
    pruner.example_inputs = example().cuda()
    assert run_on_gpu(model, optimizer, pruner).macs[1] <= 0.5 * pruner.before.macs


def test_gpu_agrees_with_cpu():
    ends = []
    for device in ("cpu", "cuda"):
        model = build_model("residual").double().to(device)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        rectify = SelfRectifying(t_rate=-0.05, t_len=-1.0)
        pruner = Pruner(
            model,
            example(torch.float64).to(device),
            optimizer,
            0.5,
            smooth=SmoothPruning(steps=4),
            rectify=rectify,
        )
        stream = batches(1, torch.float64)
        for _ in range(12):
            x, y = (t.to(device) for t in next(stream))
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
        ends.append((pruner.report().widths, [p.detach().cpu() for p in model.parameters()]))
    assert ends[0][0] == ends[1][0]
    for a, b in zip(ends[0][1], ends[1][1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)
