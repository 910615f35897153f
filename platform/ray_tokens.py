"""Who is let into a Ray cluster: those who have its token, unless somebody has chosen otherwise."""

import os

from ray._raylet import Config  # type: ignore[attr-defined] # made by Cython

TOKEN_HELP = (
    "Put it into RAY_AUTH_TOKEN, or name its file in RAY_AUTH_TOKEN_PATH (by default ~/.ray/auth_token); "
    "for a cluster without tokens set RAY_AUTH_MODE=disabled. See docs/security.md."
)


def choose_tokens() -> None:
    """Where nobody has chosen, let only those in who have the token, and show ours."""
    os.environ["RAY_AUTH_MODE"] = os.environ.get("RAY_AUTH_MODE") or "token"
    Config.initialize("")  # Ray has read its mode when it was imported
