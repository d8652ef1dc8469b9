"""MMLU: questions on 57 subjects with four choices each (D. Hendrycks et al., arXiv 2009.03300).

{"question": "Find the degree for the given field extension Q(sqrt(2), sqrt(3), sqrt(18)) over Q.",
 "subject": "abstract_algebra", "choices": ["0", "4", "2", "6"], "answer": 1}
"""

from __future__ import annotations

from superexperts.benchmarks.base import (
    Benchmark,
    FewShot,
    HubData,
    Item,
    Row,
    RowError,
    choice_item,
    read_field,
    read_text,
)

__all__ = ["MMLU"]


def _read(row: Row, name: str) -> Item:
    texts = [str(text).strip() for text in read_field(row, "choices", list)]
    index = read_field(row, "answer", int)
    labels = "ABCDEFGHIJ"[: len(texts)]
    # By index and never by text, because some rows have two equal choices.
    gold = labels[index] if 0 <= index < len(labels) else str(index)
    subject = row.get("subject")
    known = subject if isinstance(subject, str) and subject else None
    return choice_item(name, read_text(row, "question"), list(zip(labels, texts, strict=True)), gold, known)


def _harness_row(item: Item, row: Row) -> Row:
    if len(item.choices) != 4:
        raise RowError(f"{item.id} has {len(item.choices)} choices; the harness's task needs 4")
    return row


# The same groups as in lm-evaluation-harness, so that averages are comparable.
GROUPS = {
    "STEM": (
        *("abstract_algebra", "anatomy", "astronomy", "college_biology", "college_chemistry"),
        *("college_computer_science", "college_mathematics", "college_physics", "computer_security"),
        *("conceptual_physics", "electrical_engineering", "elementary_mathematics", "high_school_biology"),
        *("high_school_chemistry", "high_school_computer_science", "high_school_mathematics"),
        *("high_school_physics", "high_school_statistics", "machine_learning"),
    ),
    "humanities": (
        *("formal_logic", "high_school_european_history", "high_school_us_history", "high_school_world_history"),
        *("international_law", "jurisprudence", "logical_fallacies", "moral_disputes", "moral_scenarios"),
        *("philosophy", "prehistory", "professional_law", "world_religions"),
    ),
    "social sciences": (
        *("econometrics", "high_school_geography", "high_school_government_and_politics"),
        *("high_school_macroeconomics", "high_school_microeconomics", "high_school_psychology"),
        *("human_sexuality", "professional_psychology", "public_relations", "security_studies", "sociology"),
        "us_foreign_policy",
    ),
    "other": (
        *("business_ethics", "clinical_knowledge", "college_medicine", "global_facts", "human_aging"),
        *("management", "marketing", "medical_genetics", "miscellaneous", "nutrition"),
        *("professional_accounting", "professional_medicine", "virology"),
    ),
}

MMLU = Benchmark(
    name="mmlu",
    title="MMLU",
    read=_read,
    size=14042,
    original_name="",  # rep/mmlu.py writes raw_result_baseline.json, without a name
    hub=HubData(path="cais/mmlu", config="all", revision="c30699e8356da336a370243923dbaf21066bb9fe"),
    examples_split="dev",
    file="mmlu_all_test",
    examples_file="mmlu_all_dev",
    few_shot=FewShot(
        shots=5,
        folder="mmlu/default",
        task="mmlu_{subject}",
        by_subject=True,
        # The pocket world has subjects that MMLU does not have.
        other_subject=(
            "mmlu_abstract_algebra",
            "The following are multiple choice questions (with answers) about {subject}.\n\n",
        ),
        row=_harness_row,
    ),
    groups=GROUPS,
    result_column=0,
)
