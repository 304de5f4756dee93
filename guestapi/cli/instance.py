"""``guestapi instance``: which instances there are, and which process each one is."""

from __future__ import annotations

import click

from guestapi.callers.namespaces import examine, is_alive
from guestapi.cli.common import (
    Operator,
    described,
    fail,
    has_format,
    print_devices,
    print_json,
    print_pairs,
    print_table,
    status,
    takes_instance,
)
from guestapi.cli.words import pairs
from guestapi.model import Device, InstanceType
from guestapi.store import steps
from guestapi.store.lookup import get_instance, list_instances


@click.group()
def instance() -> None:
    """Register, list, show and remove instances."""


@instance.command()
@takes_instance
@click.option("--type", "kind", type=click.Choice(["container", "virtual-machine"]), default="container")
@click.option("--uuid", metavar="U", help="Its UUID; default: a new one.")
@click.option("--location", metavar="L", help="The cluster member's name; default: this host's.")
@click.option("--config", "config", multiple=True, metavar="KEY=VALUE", help="Configuration; KEY=@FILE reads a file.")
@click.option("--device", multiple=True, metavar="NAME,type=TYPE[,KEY=VALUE]...", help="A device.")
@click.pass_obj
def add(
    operator: Operator,
    name: str,
    project: str,
    kind: InstanceType,
    uuid: str | None,
    location: str | None,
    config: tuple[str, ...],
    device: tuple[str, ...],
) -> None:
    """Add an instance that does not run yet."""
    wanted = pairs(config, files=True)
    devices = _devices(device)
    with operator.writer.change() as change:
        steps.add(
            change, project, name, type=kind, instance_uuid=uuid, location=location, config=wanted, devices=devices
        )


@instance.command()
@takes_instance
@click.option("--pid", type=click.IntRange(min=1), required=True, help="The container's init, as the host sees it.")
@click.option("--replace", is_flag=True, help="Also if another process that is alive is registered as its init.")
@click.pass_obj
def start(operator: Operator, name: str, project: str, pid: int, replace: bool) -> None:
    """Register a running container by the PID of its init. Starts nothing."""
    init = examine(pid)
    with operator.writer.change() as change:
        instance = steps.get_editable(change, project, name)
        if not replace and instance.init not in (None, init) and is_alive(instance.init):
            fail(
                f"{name} runs already: process {instance.init.pid} is its init",
                "stop that container first; --replace registers the other process all the same",
            )
        steps.start(change, instance, init)


@instance.command()
@takes_instance
@click.pass_obj
def stop(operator: Operator, name: str, project: str) -> None:
    """Record that the instance does not run any more. Stops nothing."""
    with operator.writer.change() as change:
        steps.stop(change, get_instance(change, project, name))


@instance.command()
@takes_instance
@click.pass_obj
def remove(operator: Operator, name: str, project: str) -> None:
    """Remove an instance from guestapi, running or not. The container itself stays as it is."""
    with operator.writer.change() as change:
        steps.remove(change, get_instance(change, project, name))


@instance.command(name="list")
@click.option("--project", help="Of this project alone.")
@has_format
@click.pass_obj
def list_(operator: Operator, project: str | None, as_json: bool) -> None:
    """List instances, whether they run, and the source that each belongs to."""
    with operator.view() as store:
        found = list_instances(store, project)
    if as_json:
        print_json([described(one) for one in found])
        return
    columns = ["PROJECT", "NAME", "TYPE", "STATUS", "READY", "PID", "SOURCE"]
    rows = [
        [
            one.project,
            one.name,
            one.type,
            status(one),
            "Ready" if one.ready else "",
            str(one.init.pid) if one.init else "",
            one.source or "",
        ]
        for one in found
    ]
    print_table(columns, rows)


@instance.command()
@takes_instance
@has_format
@click.pass_obj
def show(operator: Operator, name: str, project: str, as_json: bool) -> None:
    """Show everything that is stored of an instance."""
    with operator.view() as store:
        found = get_instance(store, project, name)
    document = described(found)
    if as_json:
        print_json(document)
        return
    config, devices = document.pop("config"), document.pop("devices")
    document["profiles"] = ", ".join(document["profiles"])
    print_table(["PROPERTY", "VALUE"], ((key, "" if value is None else str(value)) for key, value in document.items()))
    print_pairs(config.items())
    print_devices(devices.items())


def _devices(words: tuple[str, ...]) -> dict[str, Device]:
    devices: dict[str, Device] = {}
    for word in words:
        name, _, options = word.partition(",")
        if name in devices:
            raise click.UsageError(f"device {name!r} is given twice")
        devices[name] = pairs(options.split(",") if options else [])
        if "type" not in devices[name]:
            raise click.UsageError(f"device {name!r} has no type; write {name},type=nic or another")
    return devices
