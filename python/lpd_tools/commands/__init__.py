"""The commands of `lpd`, each a function in the file of its name; `cli` lists them.

A function of one config gets an option for each of its settings (see `options`); the others declare their own. Files of
this folder import what takes long, torch above all, inside the function: `lpd --help` reads them all.
"""
