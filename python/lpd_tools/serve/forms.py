"""The multipart form of an edit."""

from __future__ import annotations

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.datastructures import UploadFile

from lpd_tools.serve.errors import ApiError
from lpd_tools.serve.schemas import Edit
from lpd_tools.serve.work import Work

_IMAGE, _MASK = ("image", "image[]"), ("mask",)
_FIELDS = 50


async def read_edit(request: Request) -> Work:
    """Parses the edit in a form; ApiError or RequestValidationError with the name of a wrong field."""
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        raise ApiError(400, "an edit is sent as multipart/form-data, with the files image and mask")
    # The size of the whole body is bounded already.
    async with request.form(max_files=3, max_fields=_FIELDS) as form:
        files: dict[str, list[UploadFile]] = {"image": [], "mask": []}
        texts: dict[str, str] = {}
        for name, value in form.multi_items():
            kind = "image" if name in _IMAGE else "mask" if name in _MASK else None
            if isinstance(value, UploadFile) != (kind is not None):
                what = "a file" if kind else "text"
                raise ApiError(400, f"{name} must be {what}", param=name)
            if isinstance(value, UploadFile):
                files[kind or ""].append(value)
            else:
                texts[name] = value
        for kind, least in (("image", 1), ("mask", 0)):
            if not least <= len(files[kind]) <= 1:
                raise ApiError(400, f"{kind} must be one file, got {len(files[kind])}", param=kind)
        try:
            options = Edit.model_validate(texts)
        except ValidationError as error:
            raise RequestValidationError(error.errors()) from error
        image, *mask = [await file.read() for file in (*files["image"], *files["mask"])]
    return Work(options, image, mask[0] if mask else None)
