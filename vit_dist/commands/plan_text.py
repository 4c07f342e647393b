"""The plan of `vit-dist plan` for people."""

from __future__ import annotations

import math
from typing import Any

from vit_dist.batch import Batch


def render(plan: dict[str, Any]) -> list[str]:
    """The plan for people."""
    machines, batch, steps, rate = plan["machines"], plan["batch"], plan["steps"], plan["learning_rate"]
    where = f"{machines['nodes']} node{'s' if machines['nodes'] > 1 else ''} x {machines['gpus']} GPU"
    where += "s" if machines["gpus"] > 1 else ""
    if machines["cpu"]:
        where = f"the CPU of this machine, {machines['cores']} core{'s' if machines['cores'] > 1 else ''}"
    if machines["memory"]:
        where += f" of {machines['memory'] / 1e9:g} GB"
    count = plan["parameters"]
    lines = [("plan", plan["source"])]
    lines += [("data" if i == 0 else "", line) for i, line in enumerate(plan["data"])]
    lines += [
        ("model", f"{plan['model']}, {count['all']:,} parameters, {count['trained']:,} trained"),
        ("devices", f"{where}, {plan['precision']}"),
        ("batch", str(Batch(**{key: value for key, value in batch.items() if key != "global"}))),
        ("steps", f"{steps['epoch']:,} per epoch, {steps['all']:,} in all, {steps['warmup']:,} of warm-up"),
        ("rate", rate["description"]),
    ]  # fmt: skip
    if rate["curve"]:
        lines.append(("", "  ".join(f"{step:,}: {value:.1e}" for step, value in rate["curve"].items())))
    lines.append(("strategy", f"{plan['strategy']}: {plan['why']}"))
    on_gpu = "of one GPU, in GB; traffic: GB that a GPU sends per step"
    if machines["link"]:
        on_gpu += f"; ms: its time at {machines['link'] / 1e9:g} GB/s"
        on_gpu += f", {machines['node_link'] / 1e9:g} GB/s within a node" if machines["node_link"] else ""
        on_gpu += ", none of it overlapped with computing"
    lines.append(("memory", "of the process, in GB" if machines["cpu"] else on_gpu))
    kept = any(row["images"] > 5e6 for row in plan["strategies"].values())  # fewer would be a column of 0.00
    images = ("images",) if kept else ()
    columns = ("parameters", "gradients", "optimizer", "buffers", "activations", *images, "reserve", "total", "traffic")
    header = "".join(f"{name:>12}" for name in columns) + (f"{'ms':>10}" if machines["link"] else "")
    lines.append(("", f"{'':<15}{header}  fits"))
    for name, row in plan["strategies"].items():
        mark = "*" if name == plan["strategy"] else " "
        fits = {None: "?", True: "yes", False: "no"}[row["fits"]]
        host = f"  ({row['host'] / 1e9:.2f} on the host)" if row["host"] else ""
        host += f"  {row['per_device']} per device" if batch["note"] else ""
        numbers = "".join(f"{row[column] / 1e9:>12.2f}" for column in columns)
        if machines["link"]:
            numbers += f"{1e3 * row['traffic_seconds']:>10,.1f}"
        lines.append(("", f"{mark}{name:<14}{numbers}  {fits}{host}"))
    disk = plan["disk"]
    folders = disk["kept"] + 1 if disk["kept"] else None  # the new one is written before an old one goes
    space = f"{folders * disk['checkpoint'] / 1e9:.2f} GB for {folders}" if folders else "all are kept"
    lines.append(
        ("disk", f"{disk['checkpoint'] / 1e9:.2f} GB per checkpoint, {space}; best/ {disk['export'] / 1e9:.2f} GB")
    )
    time = plan["time"]
    if time["seconds"] is not None:
        limit = time["limit"]
        within = "" if limit is None else ", within the limit" if time["seconds"] < limit else ", MORE than the limit"
        lines.append(("time", f"{_clock(time['seconds'])} of training at {time['images_per_second']:,.0f} images/s "
                              f"({time['source']}){within}"))  # fmt: skip
    else:
        cure = "give --images_per_second, or finish a run of this model on this machine"
        on_gpus = "give --images_per_second, or plan beside a finished run of this model"
        lines.append(("time", f"not known; {cure if machines['cpu'] else on_gpus}"))
    lines += [("warning", line) for line in plan["warnings"]]
    return [f"{title:<9}{line}" for title, line in lines]


def _clock(seconds: float) -> str:
    hours, rest = divmod(math.ceil(seconds), 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02}"
