"""How an answer is shown, kept with its request: whoever comes back by the request's id alone sees the same events."""

import json

from common.messages import GenerationRequest
from gateway.native_format import StreamFormat
from gateway.validation import ValidGeneration

NATIVE = "native"


def presentation_of(valid: ValidGeneration) -> str:
    """For `GenerationRequest.presentation`."""
    return json.dumps(
        {
            "format": NATIVE,
            "details": valid.has_details,
            "prefix": valid.prefix,
            "characters": valid.num_characters,
            "special": valid.keeps_special_tokens,
        }
    )


def format_as_before(request: GenerationRequest) -> StreamFormat:
    """The format of a request's stream as `presentation_of` noted it; TGI's for requests that came without one."""
    shown = json.loads(request.presentation or "{}")
    return StreamFormat(
        ValidGeneration(
            requests=(request,),
            has_details=shown.get("details", True),
            prefix=shown.get("prefix", ""),
            num_characters=shown.get("characters", 0),
            keeps_special_tokens=shown.get("special", False),
        )
    )
