"""The plan of a merge, made from the experts alone: do they fit, where is the cut, is every tensor covered?"""
