"""``guestapi instance``: which instances there are, and which process each one is."""

from __future__ import annotations

from dataclasses import replace

import click

from guestapi.callers.machines import MOST_CID, examine_hybrid, examine_machine, find_hybrid, is_alive
from guestapi.callers.namespaces import examine
from guestapi.cli.common import (
    Operator,
    complete_instance,
    fail,
    has_reveal,
    has_truncate,
    in_project,
    print_devices,
    print_json,
    print_pairs,
    print_table,
    takes_instance,
    warn,
)
from guestapi.cli.definitions import as_document, check, parse, to_yaml
from guestapi.cli.fleet_options import changes_instances, takes_host
from guestapi.cli.grouping import ALIASES, FleetNoun, Verb, takes_project
from guestapi.cli.instance_list import list_
from guestapi.cli.instance_wait import wait
from guestapi.cli.printing import print_yaml
from guestapi.cli.standard_input import read_definition_text
from guestapi.cli.words import MisuseError, pairs
from guestapi.errors import OperatorError
from guestapi.model import Device, Init, Instance, InstanceType
from guestapi.store import steps
from guestapi.store.definitions import Definition, define, read_definition
from guestapi.store.errors import ConflictError
from guestapi.store.lookup import find_by_place, find_instance, get_instance


class InstanceNoun(FleetNoun):
    """The verbs of instances; `start` and `stop` are what `register` and `unregister` were called before."""

    aliases = {name: verb for name, verb in ALIASES.items() if name != "info"} | {
        "start": "register",
        "stop": "unregister",
    }


@click.group(cls=InstanceNoun)
@takes_project("The project of the instances.")
def instance() -> None:
    """Add, register, list, show, rename and remove instances."""


instance.add_command(list_)
instance.add_command(wait)


@instance.command()
@takes_instance
@takes_host("With --fleet: the host that the instance is to be on.")
@changes_instances
@click.option("--type", "kind", type=click.Choice(["container", "virtual-machine"]), help="Default: container.")
@click.option("--uuid", metavar="U", help="Its UUID; default: a new one.")
@click.option("--location", metavar="L", help="The cluster member's name; default: this host's.")
@click.option(
    "-c", "--config", "config", multiple=True, metavar="KEY=VALUE", help="Configuration; KEY=@FILE reads a file."
)
@click.option("-d", "--device", multiple=True, metavar="NAME,type=TYPE[,KEY=VALUE]...", help="A device.")
@click.option("-p", "--profile", multiple=True, metavar="PROFILE", help="A profile; of several, the last one wins.")
@click.option("--file", metavar="FILE", help="Its definition, as 'show' prints it; '-' is standard input.")
@click.pass_obj
def add(
    operator: Operator,
    name: str,
    project: str,
    kind: InstanceType | None,
    uuid: str | None,
    location: str | None,
    config: tuple[str, ...],
    device: tuple[str, ...],
    profile: tuple[str, ...],
    file: str | None,
) -> None:
    """Add an instance that does not run yet, as options or a definition say; options win.

    'guestapi instance add NAME <FILE' takes the definition from a file, too. One of another instance makes a copy, with
    a UUID of its own.
    """
    wanted = pairs(config, files=True)
    devices = _devices(device)
    text = read_definition_text(file, asked="@-" not in {word.partition("=")[2] for word in config})
    definition = Definition(name, project)
    if text is not None:
        definition = _defined(text, file, name, project)
    definition = replace(
        definition,
        type=kind or definition.type,
        uuid=definition.uuid if uuid is None else uuid,
        location=definition.location if location is None else location,
        profiles=profile or definition.profiles,
        config={**definition.config, **wanted},
        devices={**definition.devices, **devices},
    )
    warnings = check(definition)
    hosts = [] if definition.location is None else [definition.location]
    named = [(project, one) for one in definition.profiles]
    with operator.change_instances((project, name), hosts=hosts, profiles=named) as change:
        if find_instance(change, project, name) is not None:
            raise ConflictError(
                f"instance {name!r} exists already in project {project!r}", "'guestapi apply' changes one that exists"
            )
        define(change, definition)
    warn(warnings)


@instance.command(cls=Verb)
@takes_instance
@click.option("--pid", type=click.IntRange(min=1), help="Its init or VMM, as the host sees it.")
@click.option("--cid", type=click.IntRange(0, MOST_CID), help="The context ID (vsock) of a virtual machine.")
@click.option("--hybrid-vsock", "hybrid", is_flag=True, help="A virtual machine whose VMM connects to Unix sockets.")
@click.option("--vsock-socket", "path", metavar="PATH", help="The VMM's own socket for that, in the place of --pid.")
@click.option("--replace", is_flag=True, help="Also if another process that is alive is registered as its init.")
@click.pass_obj
def register(
    operator: Operator,
    name: str,
    project: str,
    pid: int | None,
    cid: int | None,
    hybrid: bool,
    path: str | None,
    replace: bool,
) -> None:
    """Register a running container by the PID of its init, or a virtual machine by its VMM and CID. Starts nothing.

    A VMM that offers vsock by Unix sockets of the host, as Firecracker does, has no CID: use --vsock-socket, or
    --hybrid-vsock with --pid.
    """
    if (hybrid or path is not None) and cid is not None:
        raise MisuseError("a virtual machine with hybrid vsock has no --cid")
    if (pid is None) == (path is None):
        raise MisuseError("give either '--pid', or '--vsock-socket' for a virtual machine with hybrid vsock")
    if path is not None:
        init = examine_hybrid(find_hybrid(path))
    else:
        assert pid is not None
        init = examine_hybrid(pid) if hybrid else examine(pid) if cid is None else examine_machine(pid, cid)
    with operator.writer.change() as change:
        instance = steps.get_editable(change, project, name)
        _check_type(instance, init)
        for other in find_by_place(change, init.namespace) if cid is not None else ():
            if other.id != instance.id and other.init not in (None, init) and is_alive(other.init):
                raise ConflictError(
                    f"CID {cid} is that of instance {other.name!r} in project {other.project!r}",
                    "a virtual machine whose CID was changed is registered again",
                )
        if not replace and instance.init not in (None, init) and is_alive(instance.init):
            fail(
                f"{name} runs already: process {instance.init.pid} is its init",
                "stop that container first; --replace registers the other process all the same",
            )
        steps.start(change, instance, init)


@instance.command(cls=Verb)
@takes_instance
@click.pass_obj
def unregister(operator: Operator, name: str, project: str) -> None:
    """Record that the instance does not run any more. Stops nothing."""
    with operator.writer.change() as change:
        steps.stop(change, get_instance(change, project, name))


@instance.command()
@in_project
@click.argument("name", nargs=-1, required=True, metavar="NAME...", shell_complete=complete_instance)
@click.option("--force", is_flag=True, help="Also those that run.")
@changes_instances
@click.pass_obj
def remove(operator: Operator, name: tuple[str, ...], project: str, force: bool) -> None:
    """Remove instances from guestapi, all or none of them. The containers themselves stay as they are."""
    with operator.change_instances(*((project, one) for one in name)) as change:
        for one in dict.fromkeys(name):
            found = get_instance(change, project, one)
            if operator.status(found) == "running" and found.init is None and not force:
                raise ConflictError(f"instance {one!r} runs on its host", "--force removes it all the same")
            steps.refuse_placed(change, found)
            if found.init is not None and is_alive(found.init) and not force:
                raise ConflictError(
                    f"instance {one!r} runs: process {found.init.pid} is its init",
                    "stop the container first; --force removes it all the same",
                )
            steps.remove(change, found)


@instance.command()
@takes_instance
@changes_instances
@click.argument("new", metavar="NEW-NAME")
@click.pass_obj
def rename(operator: Operator, name: str, project: str, new: str) -> None:
    """Give an instance another name. Its guest goes on, and keeps its host name.

    One of a fleet is that of the container that has the new name, from then on.
    """
    with operator.change_instances((project, name), (project, new)) as change:
        found = steps.get_editable(change, project, name)
        if found.source is not None and found.key is not None:
            raise ConflictError(f"instance {name!r} has its name from {found.source}", "rename the container there")
        steps.rename(change, found, project, new)


@instance.command()
@takes_instance
@click.option("--to", metavar="HOST", required=True, help="The host that is to have it; its own calls a move off.")
@click.option("--fenced", is_flag=True, help="Its host is fenced and off, so it need not release it.")
@changes_instances
@click.pass_obj
def move(operator: Operator, name: str, project: str, to: str, fenced: bool) -> None:
    """With --fleet: have an instance go to another host.

    Its host releases it first, so that no two hosts serve it. If that host cannot be reached, the move waits for it.
    """
    if not operator.is_fleet:
        raise MisuseError("move is for a fleet", f"'guestapi --fleet instance move {name} --to {to}' is")
    click.echo(operator.fleet.move((project, name), to, fenced=fenced))


@instance.command()
@takes_instance
@has_truncate
@click.option(
    "-f",
    "--format",
    "form",
    type=click.Choice(["yaml", "table", "json"]),
    default="yaml",
    show_default=True,
    help="How to print: the definition, or everything that is stored.",
)
@click.pass_obj
def show(operator: Operator, name: str, project: str, form: str, truncate: bool) -> None:
    """Print the definition of an instance, which add, apply and edit take back; or everything that is stored of it."""
    if form != "yaml":
        _print_all(operator, project, name, form, truncate)
        return
    with operator.view_instances((project, name)) as store:
        found = get_instance(store, project, name)
        definition = read_definition(store, found)
    if found.source is not None:
        key = to_yaml({"key": found.key or ""}).rstrip()
        click.echo(f"# source: {found.source}, {key}\n# 'guestapi instance info {name}' shows what it provides, too.")
    print_yaml(as_document(definition))


@instance.command()
@takes_instance
@has_reveal
@has_truncate
@click.option("-f", "--format", "form", type=click.Choice(["table", "json"]), default="table", show_default=True)
@click.pass_obj
def info(operator: Operator, name: str, project: str, form: str, truncate: bool, reveal: bool) -> None:
    """Show everything that is stored of an instance, and whether it runs."""
    _print_all(operator, project, name, form, truncate, reveal=reveal)


def _check_type(instance: Instance, init: Init) -> None:
    """Make sure that a container is registered as one, and a virtual machine as one."""
    if not init.is_machine and instance.type == "virtual-machine":
        raise OperatorError(f"{instance.name} is a virtual machine", "register it with --cid, and the PID of its VMM")
    if init.is_machine and instance.type != "virtual-machine":
        raise OperatorError(
            f"{instance.name} is a container", "leave --cid out, or add an instance with --type virtual-machine"
        )


def _print_all(operator: Operator, project: str, name: str, form: str, truncate: bool, *, reveal: bool = False) -> None:
    with operator.view_instances((project, name)) as store:
        found = get_instance(store, project, name)
    document = operator.described(found, reveal=reveal)
    if form == "json":
        print_json(document)
        return
    config, devices = document.pop("config"), document.pop("devices")
    if "profiles" in document:
        document["profiles"] = ", ".join(document["profiles"])
    rows = ((key, "" if value is None else str(value)) for key, value in document.items())
    print_table(["PROPERTY", "VALUE"], rows)
    if config:
        click.echo()
        print_pairs(config.items(), truncate=truncate)
    if devices:
        click.echo()
        print_devices(devices.items(), truncate=truncate)


def _defined(text: bytes, file: str | None, name: str, project: str) -> Definition:
    """The definition that `add` was given, as one of the instance that is to be added."""
    where = "standard input" if file in (None, "-") else str(file)
    found = parse(text, where, name=name, project=project)
    if len(found) != 1:
        raise OperatorError(f"{where}: has {len(found)} definitions, not one", "'guestapi apply -f FILE' takes several")
    definition = found[0]
    if (definition.name, definition.project) != (name, project):
        return replace(definition, name=name, project=project, uuid=None, cloud_init_id=None)
    return definition


def _devices(words: tuple[str, ...]) -> dict[str, Device]:
    devices: dict[str, Device] = {}
    for word in words:
        name, _, options = word.partition(",")
        if name in devices:
            raise MisuseError(f"device {name!r} is given twice")
        devices[name] = pairs(options.split(",") if options else [])
        if "type" not in devices[name]:
            raise MisuseError(f"device {name!r} has no type; write {name},type=nic or another")
    return devices
