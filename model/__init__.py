"""The layers of the model, built on megatron-core's tensor-parallel layers."""
