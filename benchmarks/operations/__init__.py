"""The operations that steer, one by one: cases, forms and baselines, floors, and their measuring.

``lm_steer`` and ``guidance`` and ``token_map`` run on the device, ``routing`` on the host.
"""
