"""The words of the task. They define it, so that scores can be compared with published ones.

The sentences NOISE, NEEDLE, OPENING and QUESTION are those of RULER's noise haystack (niah_single_1), from
https://github.com/NVIDIA/RULER, Copyright (c) 2024, NVIDIA CORPORATION, licensed under the Apache License, Version 2.0
(the LICENSE of this project has its text). Changed: put into the singular that RULER makes at run time for one needle,
question and answer prefix joined. Keys are drawn from word lists of this project's own.
"""

TASK = "niah_single_1"

OPENING = (
    "A special magic number is hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the number afterwards."
)
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
NEEDLE = "One of the special magic numbers for {key} is: {value}."
QUESTION = (
    "What is the special magic number for {key} mentioned in the provided text? "
    "The special magic number for {key} mentioned in the provided text is"
)

_ADJECTIVES = """
amber ancient bitter bold brave brief bright brisk broad calm careful cheerful clever cloudy cold copper curious
damp daring deep dusty eager early faint fancy fearless fierce frozen gentle giant glossy golden grand happy heavy
hollow honest humble icy idle jolly keen lively lonely lucky mellow merry mighty misty modest narrow nimble noble
odd pale patient plain polite proud quick quiet rapid restless rough royal rusty salty secret shallow sharp shiny
silent silver simple sleepy slow smooth solid spicy steady stormy strange sturdy sunny swift tall tender thirsty
tidy tiny vast velvet warm wild windy wise wooden young
"""
_NOUNS = """
anchor apple arrow badger banjo barrel basket beacon blanket bottle bridge bucket button cabin camel candle canyon
carpet castle cherry circle clover comet compass cottage cradle crystal desert dolphin drawer eagle engine falcon
feather ferry fiddle forest fountain garden glacier hammer harbor helmet hill island jacket kettle kitten ladder
lantern lemon lizard magnet maple marble meadow mirror mountain needle oak ocean orchard otter paddle parrot pebble
pencil pepper piano pillow planet pocket pumpkin rabbit raven ribbon river rocket saddle sailor shadow shell sparrow
spoon spring squirrel stable statue sweater table teapot thunder ticket tiger tower trumpet tulip tunnel turtle
valley violin wagon walnut whistle willow window
"""
ADJECTIVES, NOUNS = tuple(_ADJECTIVES.split()), tuple(_NOUNS.split())
