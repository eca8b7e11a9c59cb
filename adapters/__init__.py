"""LongRing's attention in other trainers' models: those of transformers and of megatron-core."""
