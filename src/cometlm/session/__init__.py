"""A session: a text of any length that is read, asked, forked and kept."""

from cometlm.core.causal_lm import CometForCausalLM
from cometlm.session.session import Session, SessionStats

__all__ = ["Session", "SessionStats"]

CometForCausalLM.session_type = Session
