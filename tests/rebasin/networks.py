"""Networks with permutation symmetries, and tasks that run them."""

import torch
import torch.nn.functional as F
from torch import nn

import bmm


class Block(nn.Module):
    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.down = None
        if stride != 1:
            self.down = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x):
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        y += x if self.down is None else self.down(x)
        return F.relu(y)


class ResNet(nn.Module):
    """Two stages; the head reads flattened channels, so that a channel is four of its inputs."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, 1, 1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.stage1 = nn.Sequential(Block(8, 8, 1), Block(8, 8, 1))
        self.stage2 = nn.Sequential(Block(8, 12, 2), Block(12, 12, 1))
        self.fc = nn.Linear(48, 5)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.bn(self.conv(x))), 2)
        return self.fc(F.adaptive_avg_pool2d(self.stage2(self.stage1(x)), 2).flatten(1))


class Odd(nn.Module):
    """Operations that must be tied or pinned: gates, depthwise convolutions, recurrences, slices, sorts."""

    def __init__(self):
        super().__init__()
        self.inputs = nn.Conv2d(3, 8, 1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.norm = nn.GroupNorm(1, 8)
        self.squeeze = nn.Linear(8, 4)
        self.excite = nn.Linear(4, 8)
        self.sliced = nn.Conv2d(8, 6, 1)
        self.grouped = nn.Conv2d(8, 8, 1, groups=2)
        self.after = nn.Linear(3, 7)
        self.lstm = nn.LSTM(7, 9, batch_first=True)
        self.sorted = nn.Linear(9, 6)
        self.out = nn.Linear(6, 4)
        self.unused = nn.Linear(5, 5)

    def forward(self, x):
        x = self.norm(self.depthwise(self.inputs(x)))
        gate = self.excite(self.squeeze(x.mean((2, 3))).relu()).sigmoid()
        x = x * gate[:, :, None, None]
        y = self.sliced(x)[:, :3].mean((-1, -2)) + self.grouped(x)[:, 1:4].mean((-1, -2))
        h = self.lstm(self.after(y)[:, None])[0][:, 0]
        return self.out(self.sorted(h).sort(-1).values)


def mlp():
    return nn.Sequential(
        nn.Linear(6, 11), nn.ReLU(), nn.Linear(11, 9), nn.LayerNorm(9), nn.GELU(), nn.Dropout(0.5), nn.Linear(9, 4)
    )


def randomise(model, seed=0):
    """Generic weights and running statistics, in evaluation mode."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            values = 0.4 * torch.randn(tensor.shape, generator=generator)
            tensor.copy_(values.abs() + 0.5 if name.endswith("running_var") else values)
    return model.eval()


def state(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


def shapes(model):
    return {k: tuple(v.shape) for k, v in model.state_dict().items()}


def task(inputs, model):
    """Labels are what ``model`` says of the inputs: other functions score lower."""
    with torch.no_grad():
        return bmm.Task("t", validation=(inputs, model(inputs).argmax(-1)), calibration=inputs)
