"""What trains: polish, of a merged model towards its experts on the same unlabelled samples, and rooting before it.

Both are off unless they are asked for. Everything else is solved layer by layer; this is a few hundred steps of AdamW
(Hinton et al., *Distilling the Knowledge in a Neural Network*, arXiv 1503.02531), after which the model is called
trained wherever it is described. No label is read.
"""
