"""One thin module of glue per host framework, and what the hosts share.

- :mod:`.megatron_lm`, :mod:`.megatron_bridge` and :mod:`.ms_swift`: where each host is held, at most 100 lines of code
  each;
- :mod:`.host`: begin, count a step, report; :mod:`.patching`: names wrapped and put back;
- :mod:`.megatron_checkpoints`: what was learned, in the checkpoints of Megatron-LM and Megatron-Bridge;
- for Megatron-LM: :mod:`.flags`, :mod:`.flops`, and :mod:`.precompute` in the place of its training loop.
"""
