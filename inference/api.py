"""What is asked of a model with SAEs, in /api/v1."""

from __future__ import annotations

from ninja import Router

from inference import api_batches, api_generate, api_infer

router = Router()
for part in (api_infer, api_batches, api_generate):
    router.add_router("", part.router)
