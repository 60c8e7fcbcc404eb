"""vLLM in processes of its own: started by the run (`where: worker`), or reached at URLs (`where: server`)."""
