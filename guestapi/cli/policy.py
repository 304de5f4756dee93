"""``guestapi policy``: what guests may read of their configuration, what is said about it, and what else they may."""

from __future__ import annotations

import click

from guestapi.cli.common import Operator, has_format, print_json, print_table, takes_instance_option
from guestapi.cli.grouping import Noun
from guestapi.model import Instance, KeyPolicy
from guestapi.store import permissions, policies
from guestapi.store.changes import timestamp
from guestapi.store.lookup import Moment, get_instance
from guestapi.store.permissions import Permission
from guestapi.store.policies import ScopedPolicy


@click.group(cls=Noun)
def policy() -> None:
    """Decide which keys guests may read, who of them, and how often; and what else they may.

    A pattern is the name of a key, in which each * stands for any characters. All policies that match a key hold.
    """


@policy.command()
@takes_instance_option
@click.argument("pattern")
@click.option("--hidden", is_flag=True, help="No guest reads the key: it is in no list, no tree and no event.")
@click.option("--uid", "uids", type=click.IntRange(0, (1 << 32) - 1), multiple=True, help="This user inside may too.")
@click.option("--secret", is_flag=True, help="Its values are in no event, no log, and not in what is shown to you.")
@click.option("--once", is_flag=True, help="The first who asks gets the value; then the key counts as unset.")
@click.pass_obj
def add(
    operator: Operator,
    pattern: str,
    project: str,
    instance: str | None,
    hidden: bool,
    uids: tuple[int, ...],
    secret: bool,
    once: bool,
) -> None:
    """Have a policy hold for the keys that PATTERN matches, in the place of an earlier one with this PATTERN.

    It holds at once, for open event streams too, and for what the change log has already.
    """
    if not (hidden or uids or secret or once):
        raise click.UsageError("give at least one of --hidden, --uid, --secret and --once")
    wanted = KeyPolicy(pattern, hidden, secret, once, frozenset(uids))
    with operator.writer.change() as change:
        policies.put(change, project, _find(change, project, instance), wanted)


@policy.command()
@takes_instance_option
@click.argument("pattern")
@click.pass_obj
def remove(operator: Operator, pattern: str, project: str, instance: str | None) -> None:
    """Have the policy with exactly this PATTERN hold no more."""
    with operator.writer.change() as change:
        policies.remove(change, project, _find(change, project, instance), pattern)


_takes_feature = click.argument("feature", type=click.Choice(permissions.FEATURES), metavar="FEATURE")


@policy.command()
@takes_instance_option
@_takes_feature
@click.pass_obj
def allow(operator: Operator, feature: str, project: str, instance: str | None) -> None:
    """Allow instances what they have not otherwise.

    FEATURE is 'attributes': to say things of themselves, which the host keeps ('guestapi attributes' shows them).
    """
    with operator.writer.change() as change:
        permissions.allow(change, project, _find(change, project, instance), feature)


@policy.command()
@takes_instance_option
@_takes_feature
@click.pass_obj
def disallow(operator: Operator, feature: str, project: str, instance: str | None) -> None:
    """Take back what 'guestapi policy allow' has allowed in the same place. What instances have said is kept."""
    with operator.writer.change() as change:
        permissions.disallow(change, project, _find(change, project, instance), feature)


@policy.command(name="list")
@has_format
@click.pass_obj
def list_(operator: Operator, as_json: bool) -> None:
    """List all policies and what is allowed, and where each holds."""
    with operator.view() as store:
        found = policies.list_policies(store)
        allowed = permissions.list_permissions(store)
    if as_json:
        print_json([*map(_policy_document, found), *map(_permission_document, allowed)])
        return
    rows = [[one.project, one.instance or "", one.policy.pattern, _describe(one.policy)] for one in found]
    rows += [[one.project, one.instance or "", "", f"allow {one.feature}"] for one in allowed]
    print_table(["PROJECT", "INSTANCE", "PATTERN", "POLICY"], rows)


@policy.command()
@has_format
@click.pass_obj
def spent(operator: Operator, as_json: bool) -> None:
    """List to whom values were given that are given once. PID and user are those that the host sees."""
    with operator.view() as store:
        found = policies.list_spends(store)
    if as_json:
        print_json(
            [
                {
                    "project": one.project,
                    "instance": one.instance,
                    "key": one.key,
                    "pid": one.pid,
                    "uid": one.uid,
                    "time": timestamp(int(one.written * 1e9)),
                    "set_anew": not one.spent,
                }
                for one in found
            ]
        )
        return
    rows = (
        [one.project, one.instance, one.key, str(one.pid), str(one.uid), timestamp(int(one.written) * 10**9)]
        for one in found
    )
    print_table(["PROJECT", "INSTANCE", "KEY", "PID", "UID", "TIME"], rows)


def _find(store: Moment, project: str, name: str | None) -> Instance | None:
    return None if name is None else get_instance(store, project, name)


def _policy_document(one: ScopedPolicy) -> dict[str, object]:
    return {
        "project": one.project,
        "instance": one.instance,
        "pattern": one.policy.pattern,
        "hidden": one.policy.hidden,
        "uids": sorted(one.policy.uids),
        "secret": one.policy.secret,
        "once": one.policy.once,
        "allow": None,
    }


def _permission_document(one: Permission) -> dict[str, object]:
    where: dict[str, object] = {"project": one.project, "instance": one.instance, "pattern": None}
    return {**where, "hidden": False, "uids": [], "secret": False, "once": False, "allow": one.feature}


def _describe(policy: KeyPolicy) -> str:
    words = [word for word in ("hidden", "secret", "once") if getattr(policy, word)]
    return ", ".join([*words, *(f"uid {uid}" for uid in sorted(policy.uids))])
