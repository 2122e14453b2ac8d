"""Tables as they are published become a cell: one call a file, or one command for all of them."""

import tempfile
from pathlib import Path

from cellattn import MultiGraph
from cellattn.data import (
    PerturbationDataset,
    build_cell,
    read_go_annotations,
    read_metabolic_model,
    read_sga,
    read_sgd_features,
    read_sources,
)

# Stand-ins of a few lines each; put the files of SGD, STRING, the Gene Ontology, ... in their place.
temporary = tempfile.TemporaryDirectory()  # gone at the end
folder = Path(temporary.name)
orfs = [("YAL001C", "TFC3", "TSV115"), ("YAL015C", "NTG1", "YAL999C"), ("YBL007C", "SLA1", ""), ("YDL227C", "HO", "")]
annotation = ["SGD", "S1", "TFC3", "involved_in", "GO:2", "PMID:1", "IDA", "", "P", "", "YAL001C", "protein", *["-"] * 5]
trigenic = [
    ("Query strain ID", "YAL015C+YBL007C_tm461", "YAL015C+YDL227C_tm462"),
    ("Array strain ID", "YAL001C_tsa91", "YAL001C_tsa91"),
    ("Combined mutant type", "trigenic", "digenic"),
    ("Adjusted genetic interaction score (epsilon or tau)", "-0.125", "NaN"),
    ("P-value", "1e-3", ""),
]
files = {
    "SGD_features.tab": ["\t".join(["S1", "ORF", "Verified", *names, *[""] * 10]) for names in orfs],
    "links.txt": ["protein1 protein2 combined_score", "4932.YAL001C 4932.YAL015C 800", "4932.YAL015C 4932.YAL001C 800"],
    "complexes.tsv": ["YAL999C\tSLA1\t1.0", "YAL015C\tYBL007C\t0.5", "YAL001C\tYZZ999W\t1.0"],
    "trigenic.txt": ["\t".join(row) for row in zip(*trigenic, strict=True)],
    "go.obo": ["format-version: 1.2", "[Term]", "id: GO:1", "name: root", "[Term]", "id: GO:2", "is_a: GO:1"],
    "sgd.gaf": ["!gaf-version: 2.2", "\t".join(annotation)],
    "model.json": [
        '{"metabolites": [{"id": "atp_c"}], "reactions": [{"id": "R1", "metabolites": {"atp_c": -1.0},',
        '"gene_reaction_rule": "YAL001C and YAL015C"}]}',
    ],
    "cell.toml": [
        '[genes]\nreader = "sgd"\npath = "SGD_features.tab"',
        '[relations.physical]\nreader = "string"\npath = "links.txt"\nscore_threshold = 400',
        '[relations.complex]\nreader = "edge-list"\npath = "complexes.tsv"\nduplicates = "max"',
        '[relations.annotated]\nreader = "go"\npath = "sgd.gaf"\nontology = "go.obo"\ntokens = "term"',
    ],
}
for name, lines in files.items():
    (folder / name).write_text("\n".join(lines) + "\n")

# Names: systematic, standard, aliases; what is ambiguous or retired is said.
named = read_sgd_features(folder / "SGD_features.tab")
genes = named.genes
assert named.retired == {"YAL999C": "YAL015C"}

# Measured sets: strains of one gene and of two, what their alleles are, the neutral control left out, missing scores counted.
screen = read_sga(folder / "trigenic.txt", genes)
print(screen.report())
data = PerturbationDataset.from_interactions(screen)
assert data.seeds.tolist() == genes.index(["NTG1", "SLA1", "TFC3"]).tolist()

# Genes and what they belong to: terms with all above them, reactions.
terms = read_go_annotations(folder / "sgd.gaf", genes, ontology=folder / "go.obo")
assert terms.names == ("GO:1", "GO:2")
model = read_metabolic_model(folder / "model.json", genes)
print(model.report())

# The cell in one call; on the command line: python -m cellattn.data build cell.toml --out cell.safetensors
cell = build_cell(folder / "cell.toml")
written = cell.save(folder / "cell.safetensors")  # with its report and, where matplotlib is, a figure of degrees
print(cell.report())
graph = MultiGraph.load(written[0])
assert graph.num_edges("complex") == 2
assert (graph.joins("annotated"), graph.node_types["term"]) == (("gene", "term"), range(4, 6))
assert read_sources(written[0])["relations"]["complex"]["counts"]["unknown"] == {"YZZ999W": 1}
