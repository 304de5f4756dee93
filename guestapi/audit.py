"""What is recorded of each change: who made it is added where it is sent (`audit_log`). The catalogue stands here.

Rules: keys are recorded, values never, since a secret may be among them. A change that touches very much is cut off and
counted.
"""

from __future__ import annotations

from typing import NamedTuple

#: Each action, and what it means.
ACTIONS = {
    "instance.add": "an instance was added",
    "instance.remove": "an instance was removed",
    "instance.configure": "its configuration, devices, profiles or properties were changed",
    "instance.rename": "an instance got another name",
    "instance.start": "an init was registered",
    "instance.stop": "its init was registered no more",
    "instance.ready": "the workload said that it is ready, or not ready",
    "key.spend": "a value that is given once was given",
    "profile.create": "a profile was made",
    "profile.edit": "a profile was changed, and with it the instances that have it",
    "profile.rename": "a profile got another name",
    "profile.remove": "a profile was removed",
    "policy.put": "a key policy was set",
    "policy.remove": "a key policy was removed",
    "permission.add": "instances were allowed something that they have not otherwise",
    "permission.remove": "they are allowed it no more",
    "attribute.set": "the instance said something of itself",
    "attribute.remove": "the instance took back what it said of itself",
    "notice.send": "something was announced to an instance",
    "notice.cancel": "a notice was taken back",
    "notice.acknowledge": "the instance acknowledged a notice",
    "image.add": "an image was imported or copied",
    "image.set": "what is said of an image was changed",
    "image.remove": "an image was removed",
    "identity.rotate": "a key that signs tokens of identity was made",
    "more": "so many further changes of the same transaction are not recorded one by one",
}
#: Each field of an entry, and what it holds.
FIELDS = {
    "AUDIT_ACTION": "what was done",
    "AUDIT_BY": "`operator`, `source` or `guest`",
    "AUDIT_USER": "the user who called the command",
    "AUDIT_SUDO_USER": "the user who called sudo(8), as sudo says",
    "AUDIT_LOGIN_USER": "the user who had logged in (pam_loginuid(8)), if that is known",
    "AUDIT_COMMAND": "the command, without its arguments",
    "AUDIT_SOURCE": "the source that was observed",
    "AUDIT_KEY": "a configuration key or an attribute that was changed; once for each",
    "AUDIT_DEVICE": "a device that was changed; once for each",
    "AUDIT_PROFILE": "a profile that was changed, or that an instance got or lost; once for each",
    "AUDIT_IMAGE": "fingerprint of an image",
    "AUDIT_PATTERN": "pattern of a key policy; or what is allowed",
    "AUDIT_BEFORE": "project and name of an instance before it was renamed",
    "AUDIT_COUNT": "instances that noticed the change of a profile; or further changes",
    "AUDIT_LEFT_OUT": "entries about this instance that were left out before this one",
}
#: The most changes of a transaction that are recorded, and the most names of a kind for each.
MOST_RECORDS, MOST_NAMES = 1000, 64


class AuditRecord(NamedTuple):
    """One change of something.

    Attributes:
        action: of `ACTIONS`.
        project: of the instance, the profile or the policy.
        instance: name of the instance.
        keys, devices, profiles: what was changed of it, or has changed.
        image, pattern: what was changed.
        noticed: how many instances noticed it, or how many further changes there were; 0: it does not matter.
        before: project and name that an instance had before.
        instance_id: the store's number of the instance; 0 if it is about none.
    """

    action: str
    project: str = ""
    instance: str = ""
    keys: tuple[str, ...] = ()
    devices: tuple[str, ...] = ()
    profiles: tuple[str, ...] = ()
    image: str = ""
    pattern: str = ""
    noticed: int = 0
    before: str = ""
    instance_id: int = 0
