"""The words of the bilingual grammar: English lemmas, their German translations, and how German ones inflect.

Every table has one word per line and is read once, at import. Kinds say what a noun can be used for: `p` person,
`a` animal, `t` thing, `l` place. German forms are looked up by case (nom, acc, dat) and by a column: the gender
(m, f, n) in the singular, `p` in the plural, because German has one set of plural endings for all genders.
"""

from functools import cache
from typing import NamedTuple

# Persons, animals, things and places, about as many of each gender where `it` can refer to them. A star marks nouns
# whose singular takes the plural's form outside the nominative (der Bär, den Bären).
_NOUNS = """
p  man/men               Mann/Männer              m      p  teacher/teachers      Lehrer/Lehrer            m
p  farmer/farmers        Bauer/Bauern             m*     p  neighbour/neighbours  Nachbar/Nachbarn         m*
p  uncle/uncles          Onkel/Onkel              m      p  boy/boys              Junge/Jungen             m*
p  banker/bankers        Bankier/Bankiers         m      p  customer/customers    Kunde/Kunden             m*
p  fisherman/fishermen   Fischer/Fischer          m      p  player/players        Spieler/Spieler          m
p  trainer/trainers      Trainer/Trainer          m      p  musician/musicians    Musiker/Musiker          m
p  doctor/doctors        Arzt/Ärzte               m      p  patient/patients      Patient/Patienten        m*
p  sailor/sailors        Matrose/Matrosen         m*     p  king/kings            König/Könige             m
p  lawyer/lawyers        Anwalt/Anwälte           m      p  woman/women           Frau/Frauen              f
p  mother/mothers        Mutter/Mütter            f      p  sister/sisters        Schwester/Schwestern     f
p  aunt/aunts            Tante/Tanten             f      p  queen/queens          Königin/Königinnen       f
p  witch/witches         Hexe/Hexen               f      p  daughter/daughters    Tochter/Töchter          f
p  princess/princesses   Prinzessin/Prinzessinnen f      p  nun/nuns              Nonne/Nonnen             f
p  nurse/nurses          Krankenschwester/Krankenschwestern f  p  child/children  Kind/Kinder              n
p  baby/babies           Baby/Babys               n
a  dog/dogs              Hund/Hunde               m      a  bird/birds            Vogel/Vögel              m
a  fox/foxes             Fuchs/Füchse             m      a  wolf/wolves           Wolf/Wölfe               m
a  bear/bears            Bär/Bären                m*     a  donkey/donkeys        Esel/Esel                m
a  lion/lions            Löwe/Löwen               m*     a  penguin/penguins      Pinguin/Pinguine         m
a  cat/cats              Katze/Katzen             f      a  cow/cows              Kuh/Kühe                 f
a  mouse/mice            Maus/Mäuse               f      a  goat/goats            Ziege/Ziegen             f
a  snake/snakes          Schlange/Schlangen       f      a  spider/spiders        Spinne/Spinnen           f
a  duck/ducks            Ente/Enten               f      a  owl/owls              Eule/Eulen               f
a  horse/horses          Pferd/Pferde             n      a  pig/pigs              Schwein/Schweine         n
a  rabbit/rabbits        Kaninchen/Kaninchen      n      a  chicken/chickens      Huhn/Hühner              n
a  camel/camels          Kamel/Kamele             n      a  crocodile/crocodiles  Krokodil/Krokodile       n
a  calf/calves           Kalb/Kälber              n      a  insect/insects        Insekt/Insekten          n
t  table/tables          Tisch/Tische             m      t  chair/chairs          Stuhl/Stühle             m
t  key/keys              Schlüssel/Schlüssel      m      t  suitcase/suitcases    Koffer/Koffer            m
t  mirror/mirrors        Spiegel/Spiegel          m      t  ball/balls            Ball/Bälle               m
t  letter/letters        Brief/Briefe             m      t  contract/contracts    Vertrag/Verträge         m
t  cheque/cheques        Scheck/Schecks           m      t  lamp/lamps            Lampe/Lampen             f
t  clock/clocks          Uhr/Uhren                f      t  bottle/bottles        Flasche/Flaschen         f
t  cup/cups              Tasse/Tassen             f      t  newspaper/newspapers  Zeitung/Zeitungen        f
t  machine/machines      Maschine/Maschinen       f      t  camera/cameras        Kamera/Kameras           f
t  coin/coins            Münze/Münzen             f      t  violin/violins        Geige/Geigen             f
t  book/books            Buch/Bücher              n      t  car/cars              Auto/Autos               n
t  picture/pictures      Bild/Bilder              n      t  bicycle/bicycles      Fahrrad/Fahrräder        n
t  knife/knives          Messer/Messer            n      t  dress/dresses         Kleid/Kleider            n
t  piano/pianos          Klavier/Klaviere         n      t  boat/boats            Boot/Boote               n
l  garden/gardens        Garten/Gärten            m      l  forest/forests        Wald/Wälder              m
l  park/parks            Park/Parks               m      l  station/stations      Bahnhof/Bahnhöfe         m
l  tower/towers          Turm/Türme               m      l  river/rivers          Fluss/Flüsse             m
l  zoo/zoos              Zoo/Zoos                 m      l  school/schools        Schule/Schulen           f
l  factory/factories     Fabrik/Fabriken          f      l  kitchen/kitchens      Küche/Küchen             f
l  city/cities           Stadt/Städte             f      l  cave/caves            Höhle/Höhlen             f
l  church/churches       Kirche/Kirchen           f      l  harbour/harbours      Hafen/Häfen              m
l  house/houses          Haus/Häuser              n      l  village/villages      Dorf/Dörfer              n
l  hotel/hotels          Hotel/Hotels             n      l  museum/museums        Museum/Museen            n
l  castle/castles        Schloss/Schlösser        n      l  room/rooms            Zimmer/Zimmer            n
l  stadium/stadiums      Stadion/Stadien          n      l  hospital/hospitals    Krankenhaus/Krankenhäuser n
"""

# Ambiguous nouns: both senses are used in the same places with the same words, so only a cue can tell them apart.
_AMBIGUOUS = """
bank/banks    finance   Bank/Banken             f    banker customer cheque coin
bank/banks    river     Ufer/Ufer               n    fisherman boat duck river
bat/bats      animal    Fledermaus/Fledermäuse  f    cave owl spider insect
bat/bats      sport     Schläger/Schläger       m    player trainer ball stadium
organ/organs  music     Orgel/Orgeln            f    church musician nun violin
organ/organs  medicine  Organ/Organe            n    doctor nurse patient hospital
seal/seals    animal    Robbe/Robben            f    penguin sailor harbour zoo
seal/seals    document  Siegel/Siegel           n    letter contract lawyer king
"""

# English forms; German infinitive (a bar after a separable prefix), third person, participle; the perfect's auxiliary;
# frame (acc, dat: case of the object; give: accusative and dative; none: no object; that: a clause); kinds of the
# subject and of the object.
_VERBS = """
see        sees        seen          sehen         sieht         gesehen       haben  acc   pa  patl
hear       hears       heard         hören         hört          gehört        haben  acc   pa  pat
find       finds       found         finden        findet        gefunden      haben  acc   pa  patl
love       loves       loved         lieben        liebt         geliebt       haben  acc   pa  patl
hate       hates       hated         hassen        hasst         gehasst       haben  acc   pa  patl
seek       seeks       sought        suchen        sucht         gesucht       haben  acc   pa  patl
watch      watches     watched       beobachten    beobachtet    beobachtet    haben  acc   pa  patl
need       needs       needed        brauchen      braucht       gebraucht     haben  acc   pa  pat
forget     forgets     forgotten     vergessen     vergisst      vergessen     haben  acc   pa  patl
touch      touches     touched       berühren      berührt       berührt       haben  acc   pa  pat
protect    protects    protected     beschützen    beschützt     beschützt     haben  acc   pa  patl
leave      leaves      left          verlassen     verlässt      verlassen     haben  acc   pa  pl
bite       bites       bitten        beißen        beißt         gebissen      haben  acc   a   pa
chase      chases      chased        jagen         jagt          gejagt        haben  acc   a   pa
buy        buys        bought        kaufen        kauft         gekauft       haben  acc   p   atl
paint      paints      painted       malen         malt          gemalt        haben  acc   p   patl
clean      cleans      cleaned       putzen        putzt         geputzt       haben  acc   p   tl
carry      carries     carried       tragen        trägt         getragen      haben  acc   p   at
describe   describes   described     beschreiben   beschreibt    beschrieben   haben  acc   p   patl
steal      steals      stolen        stehlen       stiehlt       gestohlen     haben  acc   p   at
feed       feeds       fed           füttern       füttert       gefüttert     haben  acc   p   a
visit      visits      visited       besuchen      besucht       besucht       haben  acc   p   pl
call       calls       called        an|rufen      ruft          angerufen     haben  acc   p   p
invite     invites     invited       ein|laden     lädt          eingeladen    haben  acc   p   p
fetch      fetches     fetched       ab|holen      holt          abgeholt      haben  acc   p   pat
help       helps       helped        helfen        hilft         geholfen      haben  dat   pa  pa
follow     follows     followed      folgen        folgt         gefolgt       sein   dat   pa  pa
thank      thanks      thanked       danken        dankt         gedankt       haben  dat   p   pa
trust      trusts      trusted       vertrauen     vertraut      vertraut      haben  dat   pa  pa
give       gives       given         geben         gibt          gegeben       haben  give  p   at
show       shows       shown         zeigen        zeigt         gezeigt       haben  give  p   atl
send       sends       sent          schicken      schickt       geschickt     haben  give  p   at
sell       sells       sold          verkaufen     verkauft      verkauft      haben  give  p   atl
sleep      sleeps      slept         schlafen      schläft       geschlafen    haben  none  pa  -
wait       waits       waited        warten        wartet        gewartet      haben  none  pa  -
sing       sings       sung          singen        singt         gesungen      haben  none  pa  -
dance      dances      danced        tanzen        tanzt         getanzt       haben  none  pa  -
work       works       worked        arbeiten      arbeitet      gearbeitet    haben  none  pa  -
jump       jumps       jumped        springen      springt       gesprungen    sein   none  pa  -
arrive     arrives     arrived       an|kommen     kommt         angekommen    sein   none  pa  -
stand      stands      stood         stehen        steht         gestanden     haben  none  tl  -
burn       burns       burned        brennen       brennt        gebrannt      haben  none  tl  -
disappear  disappears  disappeared   verschwinden  verschwindet  verschwunden  sein   none  tl  -
fall       falls       fallen        um|fallen     fällt         umgefallen    sein   none  tl  -
say        says        said          sagen         sagt          gesagt        haben  that  p   -
believe    believes    believed      glauben       glaubt        geglaubt      haben  that  pa  -
hope       hopes       hoped         hoffen        hofft         gehofft       haben  that  pa  -
dream      dreams      dreamt        träumen       träumt        geträumt      haben  that  pa  -
explain    explains    explained     erklären      erklärt       erklärt       haben  that  p   -
be         is          been          sein          ist           gewesen       sein   be    patl -
"""

_ADJECTIVES = """
patl  old alt              patl  big groß             patl  small klein          patl  beautiful schön
patl  ugly hässlich        patl  strange seltsam      patl  famous berühmt       patl  dirty schmutzig
patl  dangerous gefährlich patl  quiet ruhig          pat   heavy schwer         pat   white weiß
pa    young jung           pa    hungry hungrig       pa    tired müde           pa    sad traurig
pa    happy glücklich      pa    clever klug          pa    lazy faul            pa    brave mutig
pa    ill krank            pa    angry wütend         pa    friendly freundlich  pa    wild wild
atl   grey grau            tl    new neu              tl    cheap billig         tl    modern modern
tl    empty leer           tl    valuable wertvoll    tl    green grün           tl    red rot
"""

# English, German, case it governs, kinds of its noun.
_PREPOSITIONS = """
in in dat l         behind hinter dat tl    beside neben dat patl    near bei dat patl
under unter dat t   with mit dat pat        without ohne acc pat
"""

FRONT_ADVERBS = (
    ("today", "heute"),
    ("now", "jetzt"),
    ("here", "hier"),
    ("there", "dort"),
    ("maybe", "vielleicht"),
    ("sometimes", "manchmal"),
)
MIDDLE_ADVERBS = (("often", "oft"), ("always", "immer"), ("never", "nie"), ("seldom", "selten"), ("really", "wirklich"))
SUBORDINATORS = (
    ("because", "weil"),
    ("although", "obwohl"),
    ("when", "wenn"),
    ("while", "während"),
    ("before", "bevor"),
    ("if", "falls"),
)
MODALS = (("can", "können"), ("must", "müssen"), ("should", "sollen"), ("will", "werden"))


class Noun(NamedTuple):
    """A noun, or one sense of an ambiguous noun."""

    english: str
    englishes: str
    german: str
    germans: str
    gender: str
    weak: bool
    kind: str
    sense: str = ""

    def english_form(self, plural: bool) -> str:
        return self.englishes if plural else self.english

    def german_form(self, case: str, plural: bool) -> str:
        if plural:
            return self.germans + "n" if case == "dat" and self.germans[-1] not in "ns" else self.germans
        return self.germans if self.weak and case != "nom" else self.german

    def column(self, plural: bool) -> str:
        return "p" if plural else self.gender


class Verb(NamedTuple):
    """A verb with its translation; `subjects` and `objects` are the kinds of nouns it goes with."""

    english: str
    third: str
    participle: str
    prefix: str
    infinitive: str
    german_third: str
    german_participle: str
    auxiliary: str
    frame: str
    subjects: str
    objects: str


class Adjective(NamedTuple):
    english: str
    german: str
    kinds: str


class Preposition(NamedTuple):
    english: str
    german: str
    case: str
    kinds: str


class Ambiguity(NamedTuple):
    """One sense of an ambiguous noun, and the nouns that give it away."""

    noun: Noun
    cues: tuple[Noun, ...]


def _rows(table: str, width: int) -> list[list[str]]:
    words = table.split()
    return [words[i : i + width] for i in range(0, len(words), width)]


def _noun(kind: str, english: str, german: str, gender: str, sense: str = "") -> Noun:
    (singular, plural), (german_singular, german_plural) = english.split("/"), german.split("/")
    return Noun(singular, plural, german_singular, german_plural, gender[0], gender.endswith("*"), kind, sense)


def _verb(row: list[str]) -> Verb:
    prefix, _, infinitive = row[3].rpartition("|")
    return Verb._make([*row[:3], prefix, infinitive, *row[4:]])


NOUNS = tuple(_noun(*row) for row in _rows(_NOUNS, 4))
VERBS = tuple(_verb(row) for row in _rows(_VERBS, 10))
ADJECTIVES = tuple(Adjective(english, german, kinds) for kinds, english, german in _rows(_ADJECTIVES, 3))
PREPOSITIONS = tuple(Preposition(*row) for row in _rows(_PREPOSITIONS, 4))
_BY_ENGLISH = {noun.english: noun for noun in NOUNS}
AMBIGUITIES = tuple(
    Ambiguity(_noun("t", english, german, gender, sense), tuple(_BY_ENGLISH[cue] for cue in cues))
    for english, sense, german, gender, *cues in _rows(_AMBIGUOUS, 8)
)


def _paradigm(nominative: str, accusative: str, dative: str) -> dict[tuple[str, str], str]:
    """Forms by (case, column); columns are m f n p, and a hyphen is an empty ending."""
    rows = {"nom": nominative, "acc": accusative, "dat": dative}
    return {
        (case, column): form.replace("-", "")
        for case, row in rows.items()
        for column, form in zip("mfnp", row.split(), strict=True)
    }


_DEFINITE = _paradigm("der die das die", "den die das die", "dem der dem den")
_THIS = _paradigm("dieser diese dieses diese", "diesen diese dieses diese", "diesem dieser diesem diesen")
_MINE = _paradigm("- e - e", "en e - e", "em er em en")
_WEAK = _paradigm("e e e en", "en e e en", "en en en en")
_MIXED = _paradigm("er e es en", "en e es en", "en en en en")
_STRONG = _paradigm("er e es e", "en e es e", "em er em en")

# English (singular, plural) determiner; German forms by case and column; endings of an adjective behind it.
DETERMINERS = {
    "the": ("the", "the", _DEFINITE, _WEAK),
    "this": ("this", "these", _THIS, _WEAK),
    "my": ("my", "my", {key: "mein" + ending for key, ending in _MINE.items()}, _MIXED),
    # The plural of "a" is no word at all, and then the adjective has to show the case.
    "a": ("a", "", {key: "" if key[1] == "p" else "ein" + ending for key, ending in _MINE.items()},
          {key: _STRONG[key] if key[1] == "p" else ending for key, ending in _MIXED.items()}),
}  # fmt: skip
RELATIVES = _DEFINITE | {("dat", "p"): "denen"}
PERSONALS = _paradigm("er sie es sie", "ihn sie es sie", "ihm ihr ihm ihnen")
ENGLISH_PERSONALS = {"m": "he", "f": "she", "n": "it", "p": "they"}
ENGLISH_OBJECTS = {"he": "him", "she": "her", "it": "it", "they": "them"}
CONTRACTIONS = {("in", "dem"): "im", ("bei", "dem"): "beim"}

# Finite forms, English and German, that are not listed with a verb: third person singular, plural (also "we").
_FINITE = {
    "be": ("is", "are"),
    "was": ("was", "were"),
    "have": ("has", "have"),
    "sein": ("ist", "sind"),
    "war": ("war", "waren"),
    "haben": ("hat", "haben"),
    "können": ("kann", "können"),
    "müssen": ("muss", "müssen"),
    "sollen": ("soll", "sollen"),
    "werden": ("wird", "werden"),
}
_FINITE |= {modal: (modal, modal) for modal, _ in MODALS}
_FINITE |= {verb.english: (verb.third, verb.english) for verb in VERBS if verb.frame != "be"}
_FINITE |= {verb.infinitive: (verb.german_third, verb.infinitive) for verb in VERBS if verb.frame != "be"}


def finite(verb: str, plural: bool) -> str:
    """The form of a verb, English or German, that agrees with its subject."""
    return _FINITE[verb][plural]


def german_adjective(adjective: Adjective, ending: str) -> str:
    """An adjective with an ending: "müde" and "er" give "müder"."""
    return adjective.german.removesuffix("e") + ending


# What fits where. The order is the tables', so that the same random numbers draw the same words.


@cache
def nouns(kinds: str) -> tuple[Noun, ...]:
    """The unambiguous nouns of these kinds."""
    return tuple(noun for noun in NOUNS if noun.kind in kinds)


@cache
def adjectives(kind: str) -> tuple[Adjective, ...]:
    """The adjectives for a kind of noun."""
    return tuple(adjective for adjective in ADJECTIVES if kind in adjective.kinds)


@cache
def verbs(frames: tuple[str, ...], subject: str = "", object: str = "") -> tuple[Verb, ...]:
    """The verbs with one of these frames that go with these kinds of subject and object ("" for any)."""
    return tuple(v for v in VERBS if v.frame in frames and subject in v.subjects and object in v.objects)


@cache
def cues(ambiguous: str) -> tuple[str, ...]:
    """The nouns that decide between the senses of this one, those of all senses together."""
    return tuple(cue.english for sense in AMBIGUITIES if sense.noun.english == ambiguous for cue in sense.cues)


@cache
def position(lemma: str) -> int:
    """Where an English noun or adjective stands in its table (an ambiguous noun: behind all others)."""
    for lemmas in ([n.english for n in (*NOUNS, *(a.noun for a in AMBIGUITIES))], [a.english for a in ADJECTIVES]):
        if lemma in lemmas:
            return lemmas.index(lemma)
    raise KeyError(lemma)
