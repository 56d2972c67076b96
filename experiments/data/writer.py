"""How a sentence of the bilingual grammar comes about: drawn at random, in both languages at once."""

import random
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

from experiments.data import lexicon
from experiments.data.lexicon import Ambiguity, Noun, Verb
from experiments.data.words import (
    NOTHING,
    Clause,
    Order,
    Pair,
    Parts,
    Phrase,
    Referent,
    Side,
    Word,
    Words,
    joined,
    translated,
)

T = TypeVar("T")


class Style(NamedTuple):
    """How rich the sentences are.

    Attributes:
        clauses: Weights of 1, 2, 3 and 4 clauses, adding up to 1.
        modifiers: Chance that a noun has a phrase or a relative clause behind it.
        places: Chance of a prepositional phrase in a clause.
    """

    clauses: tuple[float, float, float, float]
    modifiers: float
    places: float


class Writer:
    """Writes one sentence: draws words at random and puts them together in both languages."""

    def __init__(self, rng: random.Random, style: Style):
        self.rng = rng
        self.style = style
        self.used: list[str] = []
        self.constructions: list[str] = []
        self.combinations: list[tuple[str, str]] = []
        self.words: dict[str, Word] = {}
        self.ambiguity: Ambiguity | None = None
        # An ambiguous noun and one cue wait until a phrase needs such nouns; no other cue may then turn up.
        self.waiting: list[Noun] = []
        if self.chance(0.5):
            self.ambiguity = self.pick(lexicon.AMBIGUITIES)
            self.waiting = [self.ambiguity.noun, self.pick(self.ambiguity.cues)]
            self.used += lexicon.cues(self.ambiguity.noun.english)

    def chance(self, probability: float) -> bool:
        return self.rng.random() < probability

    def pick(self, options: Sequence[T]) -> T:
        return options[int(self.rng.random() * len(options))]

    def note(self, construction: str):
        if construction not in self.constructions:
            self.constructions.append(construction)

    # Noun phrases

    def noun(self, kinds: str) -> Noun:
        """A noun that the sentence does not have yet, so that what a pronoun stands for is never in doubt."""
        for noun in self.waiting:
            if noun.kind in kinds and self.chance(0.7):
                self.waiting.remove(noun)
                self.used.append(noun.english)
                return noun
        while (noun := self.pick(lexicon.nouns(kinds))).english in self.used:
            pass
        self.used.append(noun.english)
        return noun

    def noun_phrase(self, case: str, kinds: str, modifiers: float = 0.0, phrases: bool = True) -> Phrase:
        """Determiner, perhaps an adjective, a noun, and with chance `modifiers` something behind it.

        That is a relative clause or, where `phrases` allows it, a prepositional phrase.
        """
        noun, plural = self.noun(kinds), self.chance(0.4)
        column = noun.column(plural)
        determiner = self.pick(("the", "the", "the", "a", "a", "this", "my"))
        singular_form, plural_form, forms, endings = lexicon.DETERMINERS[determiner]
        source = [Word(noun.english_form(plural), "NOUN", sense=noun.sense)]
        target = [Word(noun.german_form(case, plural), "NOUN", (source[0],))]
        who = Referent(noun, plural, source[0], target[0])
        self.words[noun.english] = source[0]
        if self.chance(0.36):
            adjective = self.pick(lexicon.adjectives(noun.kind))
            self.combinations.append((noun.english, adjective.english))
            german = lexicon.german_adjective(adjective, endings[case, column])
            source, target = joined(translated(adjective.english, german, "ADJ"), (source, target))
        if english := plural_form if plural else singular_form:
            if english == "a" and source[0].text[0] in "aeiou":
                english = "an"
            source, target = joined(translated(english, forms[case, column], "DET"), (source, target))
        if self.chance(modifiers):
            behind = self.relative(who) if not phrases or self.chance(0.5) else self.prepositional(modifiers / 2)
            source, target = joined((source, target), behind)
        return Phrase(source, target, (who.source, who.target), who, definite=determiner != "a")

    def prepositional(self, modifiers: float = 0.0) -> Words:
        """Preposition and noun phrase: "behind the old house"."""
        preposition = self.pick(lexicon.PREPOSITIONS)
        phrase = self.noun_phrase(preposition.case, preposition.kinds, modifiers)
        source, target = translated(preposition.english, preposition.german, "PREP")
        article, *rest = phrase.target
        if contracted := lexicon.CONTRACTIONS.get((preposition.german, article.text)):
            return source + phrase.source, [Word(contracted, "PREP", (*source, *article.translates)), *rest]
        return source + phrase.source, target + phrase.target

    def pronoun(self, who: Referent, case: str) -> Phrase:
        """A personal pronoun: English shows whether it is a person, German the gender of the noun."""
        assert who.noun is not None
        column = who.noun.column(who.plural)
        english = "it" if who.kind != "p" and not who.plural else lexicon.ENGLISH_PERSONALS[column]
        if case != "nom":
            english = lexicon.ENGLISH_OBJECTS[english]
        self.note("subject pronoun" if case == "nom" else "object pronoun")
        source, target = translated(english, lexicon.PERSONALS[case, column], "PRON")
        source[0].antecedent, target[0].antecedent = who.source, who.target
        return Phrase(source, target, (source[0], target[0]), who)

    def subject(self, kinds: str, modifiers: float = 0.0) -> Phrase:
        """A new subject: mostly a noun phrase, sometimes we."""
        if "p" in kinds and self.chance(0.1):
            source, target = translated("we", "wir", "PRON")
            return Phrase(source, target, (source[0], target[0]), Referent(None, True, source[0], target[0]))
        return self.noun_phrase("nom", kinds, modifiers)

    def relative(self, head: Referent) -> Words:
        """A relative clause, whose subject or object is the noun before it: "that the dog sees"."""
        assert head.noun is not None
        column = head.noun.column(head.plural)
        source, target = translated("who" if head.kind == "p" else "that", "", "REL")
        source[0].antecedent, target[0].antecedent = head.source, head.target
        if self.chance(0.5):
            self.note("subject relative")
            target[0].text = lexicon.RELATIVES["nom", column]
            clause = self.clause("last", Phrase(source, target, (head.source, head.target), head), modifiers=0.0)
            words = clause.source, clause.target
        else:
            self.note("object relative")
            verb = self.pick(lexicon.verbs(("acc", "dat"), object=head.kind))
            target[0].text = lexicon.RELATIVES[verb.frame, column]
            clause = self.clause("last", self.subject(verb.subjects), verb=verb, gap=True)
            words = source + clause.source, target + clause.target
        return words[0], [Word(",", "PUNCT"), *words[1], Word(",", "PUNCT")]

    # Clauses

    def agreeing(self, english: str, german: str, tag: str, subject: Phrase) -> Words:
        """A finite verb, in the form that its subject asks for."""
        plural = subject.who.plural
        source, target = translated(lexicon.finite(english, plural), lexicon.finite(german, plural), tag)
        source[0].subject, target[0].subject = subject.heads
        return source, target

    def verb_group(self, verb: Verb, subject: Phrase, order: Order) -> tuple[Words, Words]:
        """The finite verb, and what else belongs to it: participle, infinitive or separated prefix."""
        tense = self.rng.random()
        if tense < 0.18:
            self.note("modal")
            rest = translated(verb.english, verb.prefix + verb.infinitive, "VERB")
            return self.agreeing(*self.pick(lexicon.MODALS), "AUX", subject), rest
        if tense < 0.45 and verb.frame == "be":
            return self.agreeing("was", "war", "VERB", subject), NOTHING
        if tense < 0.45:
            self.note("perfect")
            rest = translated(verb.participle, verb.german_participle, "VERB")
            return self.agreeing("have", verb.auxiliary, "AUX", subject), rest
        source, target = self.agreeing(verb.english, verb.infinitive, "VERB", subject)
        if verb.prefix and order == "second":
            self.note("separated prefix")
            return (source, target), ([], [Word(verb.prefix, "PART", (source[0],))])
        target[0].text = verb.prefix + target[0].text
        return (source, target), NOTHING

    def verb(self, kind: str, previous: Clause | None) -> Verb:
        """A verb for this kind of subject, preferably one that can go on with the previous clause's object."""
        if kind in "tl":
            return self.pick(lexicon.verbs(("be",) if self.chance(0.6) else ("none",), kind))
        if previous and previous.object and self.chance(0.5):
            return self.pick(lexicon.verbs(("acc", "dat"), kind, previous.object.kind))
        draw = self.rng.random()
        frame = "be" if draw < 0.16 else "none" if draw < 0.32 else "dat" if draw < 0.45 else "acc"
        return self.pick(lexicon.verbs(("give",) if frame == "acc" and draw < 0.62 and kind == "p" else (frame,), kind))

    def object(self, verb: Verb, case: str, previous: Clause | None, modifiers: float) -> Phrase:
        """An object: if possible often a pronoun for the previous clause's object."""
        who = previous.object if previous else None
        if who and who.kind in verb.objects and self.chance(0.8):
            return self.pronoun(who, case)
        return self.noun_phrase(case, verb.objects, modifiers, phrases=False)

    def clause(
        self,
        order: Order,
        subject: Phrase | None = None,
        previous: Clause | None = None,
        verb: Verb | None = None,
        gap: bool = False,
        front: Words | None = None,
        modifiers: float | None = None,
    ) -> Clause:
        """A clause in English order and in German order.

        Args:
            order: Where German puts the finite verb.
            subject: The subject, if it is given; else the previous clause's as a pronoun, or a new one.
            previous: The clause before, for pronouns.
            verb: The verb, if it is given.
            gap: Whether a relative pronoun, written by the caller, is the object.
            front: What stands before the clause and takes the first place of a German main clause.
            modifiers: Chance that a noun has something behind it.
        """
        modifiers = self.style.modifiers if modifiers is None else modifiers
        if subject is None and previous and previous.subject.noun and self.chance(0.55):
            subject = self.pronoun(previous.subject, "nom")
        if subject is None:
            kinds = verb.subjects if verb else "pa" if self.chance(0.7) else "tl"
            subject = self.subject(kinds, modifiers)
        verb = verb or self.verb(subject.who.kind, previous)
        finite, rest = self.verb_group(verb, subject, order)
        adverb = translated(*self.pick(lexicon.MIDDLE_ADVERBS), "ADV") if self.chance(0.15) else NOTHING

        # A prepositional phrase behind an object belongs to the clause, never to the object, and it then cannot follow
        # a relative clause. None comes between "says" and "that", which would look like a relative pronoun there.
        located = verb.frame != "that" and self.chance(self.style.places)
        fronted = located and order == "second" and front is None and self.chance(0.5)
        free = 0.0 if located and not fronted else modifiers
        objects: list[Phrase] = []
        if verb.frame in ("acc", "dat") and not gap:
            objects = [self.object(verb, verb.frame, previous, free)]
        elif verb.frame == "give":
            self.note("two objects")
            objects = [self.object(verb, "acc", previous, 0.0), self.noun_phrase("dat", "pa", free, phrases=False)]

        place = NOTHING
        if verb.frame == "be" and (fronted or not located or self.chance(0.6)):
            place = self.property(subject)
        elif located and not fronted:
            place = self.prepositional(modifiers / 2)
        if fronted:
            self.note("fronted")
            front = self.prepositional()
        elif order == "second" and front is None and self.chance(0.1):
            self.note("fronted")
            front = translated(*self.pick(lexicon.FRONT_ADVERBS), "ADV")

        parts = Parts(front or NOTHING, subject, finite, rest, adverb, objects, place, verb.frame == "be")
        return Clause(parts.english(), parts.german(order), subject.who, objects[0].who if objects else None)

    def property(self, subject: Phrase) -> Words:
        """What somebody or something is: an adjective, which German does not inflect here."""
        adjective = self.pick(lexicon.adjectives(subject.who.kind))
        if subject.who.noun and subject.source[0].tag != "PRON":
            self.combinations.append((subject.who.noun.english, adjective.english))
        return translated(adjective.english, adjective.german, "ADJ")

    # Sentences

    def sentence(self) -> Pair | None:
        """A chain of clauses; each one's pronouns stand for what the one before was about.

        Returns:
            The pair, or None if an ambiguous noun was used but there was no place for its cue.
        """
        (clauses,) = self.rng.choices((1, 2, 3, 4), self.style.clauses)
        draw = self.rng.random()
        if clauses > 1 and draw < 0.25:
            chain = [self.inverted()]
        elif clauses > 1 and draw < 0.4:
            reported = self.clause("second", verb=self.pick(lexicon.verbs(("that",))))
            chain = [reported, self.subordinate(reported, ("that", "dass"))]
        else:
            chain = [self.clause("second")]
        subordinated = len(chain) == 2
        for _ in range(clauses - (2 if draw < 0.4 else 1)):
            # Behind a subordinate clause "and" could continue that one, "but" reads as a new main clause.
            kind = self.rng.random()
            if kind < (0.4 if subordinated else 0.6):
                chain.append(self.subordinate(chain[-1]))
                subordinated = True
            else:
                chain.append(self.coordinate(chain[-1], "but" if subordinated or kind < 0.85 else "and"))
                subordinated = False
        words = joined(*((clause.source, clause.target) for clause in chain))
        if self.ambiguity and self.ambiguity.noun not in self.waiting and self.waiting:
            return None
        return self.pair(*joined(words, translated(".", ".", "PUNCT")))

    def subordinate(self, previous: Clause | None = None, conjunction: tuple[str, str] | None = None) -> Clause:
        """A clause whose German verb comes last: "because it sleeps"."""
        conjunction = conjunction or self.pick([c for c in lexicon.SUBORDINATORS if c[0] not in self.constructions])
        self.note(conjunction[0])
        clause = self.clause("last", previous=previous)
        source, target = translated(*conjunction, "CONJ")
        return clause._replace(source=source + clause.source, target=[Word(",", "PUNCT"), *target, *clause.target])

    def inverted(self) -> Clause:
        """A main clause with a subordinate one in front: "because it is old , the dog sleeps"."""
        fronted = self.subordinate()
        words = joined((fronted.source, fronted.target[1:]), translated(",", ",", "PUNCT"))
        return self.clause("second", previous=fronted, front=words)

    def coordinate(self, previous: Clause, conjunction: str) -> Clause:
        """A second main clause: ", but it sleeps"."""
        self.note(conjunction)
        clause = self.clause("second", previous=previous)
        if conjunction == "and":
            opening = translated("and", "und", "CONJ")
        else:
            opening = joined(translated(",", ",", "PUNCT"), translated("but", "aber", "CONJ"))
        return clause._replace(source=opening[0] + clause.source, target=opening[1] + clause.target)

    def pair(self, source: list[Word], target: list[Word]) -> Pair:
        """The finished sentence: pointers become indices."""
        target = _single_commas(target)
        places = {word: i for words in (source, target) for i, word in enumerate(words)}
        if self.ambiguity and (ambiguous := self.words.get(self.ambiguity.noun.english)):
            (ambiguous.cue,) = (self.words[c] for c in lexicon.cues(self.ambiguity.noun.english) if c in self.words)
            self.note("ambiguous noun")
        return Pair(
            source=_side(source, places),
            target=_side(target, places),
            alignment=tuple(sorted((places[s], places[t]) for t in target for s in t.translates)),
            senses=tuple(word.sense for word in source),
            cues=tuple(places[word.cue] if word.cue else -1 for word in source),
            constructions=tuple(self.constructions),
            combinations=tuple(self.combinations),
        )


def _single_commas(words: list[Word]) -> list[Word]:
    """One comma where several clauses meet, and none before the full stop."""
    kept: list[Word] = []
    for word in words:
        if word.tag == "PUNCT" and kept and kept[-1].text == ",":
            dropped = kept.pop()
            if word.text == ",":
                word.translates += dropped.translates
        kept.append(word)
    return kept


def _side(words: list[Word], places: dict[Word, int]) -> Side:
    return Side(
        words=tuple(word.text for word in words),
        tags=tuple(word.tag for word in words),
        subjects=tuple(places[word.subject] if word.subject else -1 for word in words),
        antecedents=tuple(places[word.antecedent] if word.antecedent else -1 for word in words),
    )
