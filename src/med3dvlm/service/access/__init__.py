"""Access: who may do what.

permissions.py  role → permissions, the one table
identity.py     who asks; `require("studies:read")` in front of an endpoint
gate.py         decides about every request before its body is read
users.py        accounts; passwords.py, sessions.py, keys.py, oidc.py how they prove themselves
limits.py       how often, how much
headers.py      what a browser may do with an answer
api.py          the endpoints of all this
"""

from med3dvlm.service.access.identity import Identity, require

__all__ = ["Identity", "require"]
