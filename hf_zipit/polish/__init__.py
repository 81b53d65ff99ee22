"""Polish, the one stage that trains: a merged model distilled from its experts on the same unlabelled samples.

It is off unless it is asked for. Everything before it is solved layer by layer; this is a few hundred steps of AdamW
(Hinton et al., *Distilling the Knowledge in a Neural Network*, arXiv 1503.02531), after which the model is called
trained wherever it is described. No label is read.
"""
