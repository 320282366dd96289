"""Hugging Face models, loaded layer by layer.

quiet           transformers without its progress bars and notices
demo            the demo model: fetched, converted, cached
weight_files    the files that hold a checkpoint's weights
hub             downloads from the Hugging Face hub
fingerprint     a hash of a model's content
config_check    what a config.json may ask for
source          a model's name to a checked local folder
quantization    which quantised checkpoints are read, and how
hollow          a model of which only one shard's layers are loaded
tensor_check    a checkpoint's tensors compared with the model's, without reading them
matrices        the matrices of a layer that are pruned, and the moments of their inputs
structures      the channels and heads of a layer, and how they are cut out
vocabulary      a smaller vocabulary: which tokens, and the tokenizer without the others
memory          the memory of this process
cache           keys and values of earlier tokens, per layer
replay          runs single layers exactly as the whole model would
residency       where a shard's weights are kept, and how a layer is borrowed
offload_folder  a process's folder for offloaded weights
zero            weights offloaded with DeepSpeed ZeRO
"""
