"""Reactions to feed the models with: well-known transformations written out over small building blocks, as SMILES.

No data set of reactions ships in a package, so inputs are made here. They carry no labels and are not canonical SMILES.
"""

from __future__ import annotations

import random
import re

ARYLS = (
    "c1ccccc1", "c1ccc(F)cc1", "c1ccc(Cl)cc1", "c1ccc(C)cc1", "c1ccc(OC)cc1", "c1cccc(C)c1", "c1cccc(F)c1", "c1ccncc1",
    "c1cccnc1", "c1cccs1", "c1ccc(C#N)cc1", "c1ccc(C(F)(F)F)cc1", "c1ccc2ccccc2c1", "c1cnccn1",
)  # fmt: skip
"""Written from the atom that bonds."""

ALKYLS = ("CC", "CCC", "CC(C)C", "CCCC", "CCOC", "C1CCCCC1", "C1CCCC1", "CC1CC1", "Cc1ccccc1", "CCc1ccccc1", "CCCCCC")

TEMPLATES = {
    "amide coupling": "O=C(O){a}.N{b}>>O=C(N{b}){a}",
    "amide from acid chloride": "O=C(Cl){a}.N{b}>>O=C(N{b}){a}",
    "esterification": "O=C(O){a}.O{b}>>O=C(O{b}){a}",
    "ester hydrolysis": "CCOC(=O){a}.[Na+].[OH-]>>OC(=O){a}",
    "Suzuki coupling": "Br{a}.OB(O){c}>>{a_}-{c}",
    "Buchwald-Hartwig amination": "Br{a}.N{b}>>N({b}){a}",
    "Williamson ether": "O{a}.Br{b}.O=C([O-])[O-].[K+].[K+]>>O({b}){a}",
    "reductive amination": "O=C{a}.N{b}.[BH3-]C#N.[Na+]>>C(N{b}){a}",
    "nitro reduction": "O=[N+]([O-]){a}.[H][H].[Pd]>>N{a}",
    "Boc protection": "N{b}.CC(C)(C)OC(=O)OC(=O)OC(C)(C)C>>CC(C)(C)OC(=O)N{b}",
    "Boc removal": "CC(C)(C)OC(=O)N{b}.O=C(O)C(F)(F)F>>N{b}",
    "sulfonamide": "O=S(=O)(Cl){a}.N{b}>>O=S(=O)(N{b}){a}",
    "urea": "O=C=N{a}.N{b}>>O=C(N{b})N{a}",
    "alcohol oxidation": "OC{a}.O=[Mn]=O>>O=C{a}",
    "ketone reduction": "O=C({b}){a}.[BH4-].[Na+]>>OC({b}){a}",
    "Grignard addition": "O=C{a}.Br[Mg]{b}>>OC({b}){a}",
    "Sonogashira coupling": "Br{a}.C#C{b}>>C({a})#C{b}",
    "bromination": "C{a}.O=C1CCC(=O)N1Br>>BrC{a}",
}
"""{a}, {c}: aryls; {a_}: an aryl that begins the product; {b}: an alkyl."""

TOKEN = re.compile(r"\[[^\]]*\]|Br|Cl|>>|%\d\d|.")
"""A token of SMILES: an atom in brackets, one of two letters, the arrow, a bond, ring number or parenthesis."""


def reactions(count: int, seed: int = 0) -> list[str]:
    """Distinct reactions, drawn over all templates; the same for the same seed."""
    draw = random.Random(seed)
    found: dict[str, None] = {}
    names = list(TEMPLATES)
    while len(found) < count:
        template = TEMPLATES[draw.choice(names)]
        aryl, other = draw.sample(ARYLS, 2)
        found[template.format(a=aryl, a_=aryl, b=draw.choice(ALKYLS), c=other)] = None
    return list(found)
