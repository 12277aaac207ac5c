//! What is to be known of the training rules.

/// What lists tell of a rule.
#[derive(Clone, Copy, Debug)]
pub struct RuleEntry {
    /// Name in configurations.
    pub name: &'static str,
    /// Title of the paper.
    pub title: &'static str,
    /// arXiv id.
    pub arxiv: &'static str,
    /// One line on what it does.
    pub summary: &'static str,
    /// Name, default and one line of each option.
    pub options: &'static [(&'static str, &'static str, &'static str)],
}

/// All training rules.
pub static RULES: &[RuleEntry] = &[
    RuleEntry {
        name: "plain",
        title: "LoRA: Low-Rank Adaptation of Large Language Models",
        arxiv: "2106.09685",
        summary: "gradients as they are",
        options: &[],
    },
    RuleEntry {
        name: "lora-plus",
        title: "LoRA+: Efficient Low Rank Adaptation of Large Models",
        arxiv: "2402.12354",
        summary: "B learns faster than A",
        options: &[("ratio", "16", "learning rate of B and of vectors as a multiple of that of A, greater than 0")],
    },
    RuleEntry {
        name: "lora-fa",
        title: "LoRA-FA: Memory-efficient Low-rank Adaptation for Large Language Models Fine-tuning",
        arxiv: "2308.03303",
        summary: "A stays as it begins",
        options: &[("corrected", "false", "whether the gradient of B is corrected toward the full one, as peft does")],
    },
    RuleEntry {
        name: "lora-pro",
        title: "LoRA-Pro: Are Low-Rank Adapters Properly Optimized?",
        arxiv: "2407.18242",
        summary: "gradients whose common update lies closest to the full gradient",
        options: &[
            (
                "mode",
                "full",
                "where moments live: full (as for the whole weight), efficient (on the factors), sgd (nowhere)",
            ),
            ("x_mode", "sylvester", "use of what is left free: sylvester, symmetry, zero"),
            ("delta", "1e-8", "damping of the factors' products with themselves, greater than 0"),
        ],
    },
    RuleEntry {
        name: "allora",
        title: "ALLoRA: Adaptive Learning Rate Mitigates LoRA Fatal Flaws",
        arxiv: "2410.09692",
        summary: "outputs learn more slowly as their part of the update grows; no scale, no dropout",
        options: &[
            ("eta", "4", "factor of the learning rate where the update is zero, greater than 0"),
            ("norm_of", "ba_row", "what an output's factor falls with: ba_row (its part of the product), b_row (of B)"),
        ],
    },
];
