"""The way from text to an SAE in /api/v1: corpora, activations, training, evaluations."""

from __future__ import annotations

from ninja import Router

from training import api_activations, api_corpora, api_evaluations, api_sweeps, api_train

router = Router()
for part in (api_corpora, api_activations, api_train, api_sweeps, api_evaluations):
    router.add_router("", part.router)
