"""How work is divided over ranks: the mesh, ZeRO, context parallelism."""
