"""ReALLM (Leconte, Bedin, Nguyen, Moulines; arXiv 2405.13155): W ~ Q + L1 L2, Q a vector-quantised latent of an
autoencoder.

The decoder is the identity by default, the form the released code uses for every language model it evaluates: Q is a
k-means codebook over short vectors under block scales, plus a low-rank part. `decoder=mlp` and `decoder=conv` offer
neural ones to the allocation beside it. One file per algorithm; README.md lists the paper's claims, ours, each
divergence, and maps its symbols to options."""
