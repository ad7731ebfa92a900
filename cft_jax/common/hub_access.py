"""Whether the Hugging Face hub answers, found out once and quickly.

Its own client asks for every file anew, five times, with pauses between: without a network, a minute of warnings.
"""

import functools
import time

from absl import logging
from huggingface_hub import constants, errors, get_session

# Of requests or of httpx, as the version has it; httpx's connection errors are no OSErrors.
HTTP_ERROR: type[Exception] = errors.HfHubHTTPError.__mro__[1]
_TIMEOUT_SECONDS = 10
_PAUSES = (0.0, 2.0)


@functools.cache
def hub_answers() -> bool:
    """Whether the hub can be asked; False too where HF_HUB_OFFLINE forbids it.

    What it answers is of no interest here: an error of its own comes with a message later.
    """
    if constants.HF_HUB_OFFLINE:
        return False
    reason = ""
    for pause in _PAUSES:
        time.sleep(pause)
        try:
            get_session().head(constants.ENDPOINT, timeout=_TIMEOUT_SECONDS)
            return True
        except (HTTP_ERROR, OSError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    logging.info("%s does not answer (%s); only what was downloaded before is used", constants.ENDPOINT, reason)
    return False
