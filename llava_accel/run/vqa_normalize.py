"""The answer normalisation of the VQA organisers' evaluator, with its quirks.

Source: PythonEvaluationTools/vqaEvaluation/vqaEval.py of the VQA API (VQA v2; OK-VQA is scored with it too).
Published numbers were computed with it, so nothing here may be put right: cleaner rules are another metric.
"""

import re

# Removed or replaced by a space one after the other. Apostrophe, colon, full stop and `&` are not among them.
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_DIGIT_COMMA_DIGIT = re.compile(r"\d,\d")

# The evaluator's pattern is `(?!<=\d)(\.)(?!\d)`. Its first group was meant as a look-behind, but is a
# look-ahead that always holds at a full stop, so "5." loses its full stop as "st." does; only one before a
# digit stays.
_PERIOD = re.compile(r"\.(?!\d)")
# The evaluator hands `re.UNICODE` (32) to `sub` in the place of the count: from the 33rd on, full stops stay.
_MAX_PERIODS = int(re.UNICODE)

_NUMBERS = {"none": "0", "zero": "0"} | {
    word: str(number) for number, word in enumerate("one two three four five six seven eight nine ten".split(), start=1)
}
_ARTICLES = frozenset({"a", "an", "the"})

# What a word becomes = the spellings that become it. "somebody'd" loses its apostrophe where its neighbours
# gain one, "let's" and "she's" stand for themselves, and the four spellings with a capital I can never match,
# as words are lowered first.
_CONTRACTIONS_BY_RESULT = """
    ain't=aint aren't=arent can't=cant could've=couldve couldn't=couldnt couldn't've=couldn'tve,couldnt've
    didn't=didnt doesn't=doesnt don't=dont hadn't=hadnt hadn't've=hadnt've,hadn'tve hasn't=hasnt
    haven't=havent he'd=hed he'd've=hed've,he'dve he's=hes how'd=howd how'll=howll how's=hows
    I'd've=Id've,I'dve I'm=Im I've=Ive isn't=isnt it'd=itd it'd've=itd've,it'dve it'll=itll let's=let's
    ma'am=maam mightn't=mightnt mightn't've=mightnt've,mightn'tve might've=mightve mustn't=mustnt
    must've=mustve needn't=neednt not've=notve o'clock=oclock oughtn't=oughtnt
    'ow's'at=ow's'at,'ows'at,'ow'sat shan't=shant she'd've=shed've,she'dve she's=she's should've=shouldve
    shouldn't=shouldnt shouldn't've=shouldnt've,shouldn'tve somebodyd=somebody'd
    somebody'd've=somebodyd've,somebody'dve somebody'll=somebodyll somebody's=somebodys someone'd=someoned
    someone'd've=someoned've,someone'dve someone'll=someonell someone's=someones something'd=somethingd
    something'd've=somethingd've,something'dve something'll=somethingll that's=thats there'd=thered
    there'd've=thered've,there'dve there're=therere there's=theres they'd=theyd they'd've=theyd've,they'dve
    they'll=theyll they're=theyre they've=theyve 'twas=twas wasn't=wasnt we'd've=wed've,we'dve we've=weve
    weren't=werent what'll=whatll what're=whatre what's=whats what've=whatve when's=whens where'd=whered
    where's=wheres where've=whereve who'd=whod who'd've=whod've,who'dve who'll=wholl who's=whos who've=whove
    why'll=whyll why're=whyre why's=whys won't=wont would've=wouldve wouldn't=wouldnt
    wouldn't've=wouldnt've,wouldn'tve y'all=yall y'all'll=yall'll,y'allll
    y'all'd've=yall'd've,y'alld've,y'all'dve you'd=youd you'd've=youd've,you'dve you'll=youll you're=youre
    you've=youve
"""
CONTRACTIONS = {
    spelling: result
    for result, _, spellings in (entry.partition("=") for entry in _CONTRACTIONS_BY_RESULT.split())
    for spelling in spellings.split(",")
}


def trim(text: str) -> str:
    """The step that every answer gets: line feeds and tabs become spaces, the ends are stripped."""
    return text.replace("\n", " ").replace("\t", " ").strip()


def process_punctuation(text: str) -> str:
    """Drop or space out punctuation.

    A mark that touches a space anywhere in the text is dropped throughout, any other is replaced by a space;
    with a comma between two digits anywhere, all marks are dropped.
    """
    drop_all = _DIGIT_COMMA_DIGIT.search(text) is not None
    result = text
    for mark in _PUNCTUATION:
        drop = drop_all or f"{mark} " in text or f" {mark}" in text
        result = result.replace(mark, "" if drop else " ")
    return _PERIOD.sub("", result, count=_MAX_PERIODS)


def process_words(text: str) -> str:
    """Lower the words, write numbers up to ten as digits, drop the articles, and mend contractions."""
    words = (_NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def normalize(text: str) -> str:
    """The form in which answers are compared when the annotators do not all agree."""
    return process_words(process_punctuation(trim(text)))
