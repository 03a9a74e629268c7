"""Errors as answers to requests: what each says and how stands in server/errors.py."""

from fastapi.responses import JSONResponse

from merging import LoramixError
from server.errors import body_of, headers_of, status_of


def reply_of(error: LoramixError) -> JSONResponse:
    return JSONResponse(body_of(error), status_of(error), headers_of(error))
