"""The seam to vLLM: every name of vLLM that this project relies on, in one place.

    versions    the vLLM versions that are supported
    names       all names, with what each is used for and which feature needs it
    features    which features the installed vLLM can serve
    options     fields of vLLM's configuration, read strictly
    patching    how functions and methods of vLLM are wrapped
    vllm_name   the declaration of one name
    vllm_source definitions in the files of an installed or an unpacked vLLM, without importing it
    difference  what changed in these definitions between two versions

``python -m vllm_steer.compat`` says how many names each feature needs and which the installed vLLM
lacks; with two versions it prints what changed between them. An upgrade begins there.
"""
