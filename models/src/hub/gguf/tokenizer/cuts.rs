//! Ways of cutting a text before merging, as GGUF names them and as `tokenizer.json` spells them.

use serde_json::{Value, json};

/// One step of cutting.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Step {
    /// Each digit by itself.
    Digits,
    /// By an expression, whose matches become pieces.
    Expression(&'static str),
    /// Bytes as printable characters, after cutting by GPT-2's expression if the flag is set.
    Bytes(bool),
}

/// A way of cutting.
#[derive(Debug)]
pub(super) struct Cut {
    /// Names in files; the first one is written.
    pub names: &'static [&'static str],
    steps: &'static [Step],
    /// Takes words that are tokens whole, whatever the merges.
    pub ignore_merges: bool,
    /// Name of the normaliser of texts that models of this kind have and GGUF does not state.
    pub normalizer: Option<&'static str>,
    /// Puts the beginning before texts where the file does not say.
    pub adds_begin: bool,
}

const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

const CUTS: [Cut; 4] = [
    Cut { names: &["gpt-2"], steps: &[Step::Bytes(true)], ignore_merges: false, normalizer: None, adds_begin: false },
    Cut {
        names: &["smollm"],
        steps: &[Step::Digits, Step::Bytes(true)],
        ignore_merges: false,
        normalizer: None,
        adds_begin: false,
    },
    Cut {
        names: &["llama-bpe", "llama3", "llama-v3"],
        steps: &[Step::Expression(LLAMA3), Step::Bytes(false)],
        ignore_merges: true,
        normalizer: None,
        adds_begin: true,
    },
    Cut {
        names: &["qwen2"],
        steps: &[Step::Expression(QWEN2), Step::Bytes(false)],
        ignore_merges: false,
        normalizer: Some("NFC"),
        adds_begin: false,
    },
];

impl Cut {
    /// The names that can be read.
    pub fn known() -> String {
        CUTS.iter().map(|cut| cut.names[0]).collect::<Vec<_>>().join(", ")
    }

    pub fn named(name: &str) -> Option<&'static Self> {
        CUTS.iter().find(|cut| cut.names.contains(&name))
    }

    /// The way that a `tokenizer.json` cuts, if it is in the list.
    pub fn of_json(pre_tokenizer: &Value) -> Option<&'static Self> {
        let mut steps = Vec::new();
        flatten(pre_tokenizer, &mut steps);
        CUTS.iter().find(|cut| cut.steps.len() == steps.len() && cut.steps.iter().zip(&steps).all(|(a, b)| a.is(b)))
    }

    /// The pre-tokenizer of a `tokenizer.json`.
    pub fn json(&self) -> Value {
        match self.steps {
            [only] => only.json(),
            steps => json!({"type": "Sequence", "pretokenizers": steps.iter().map(Step::json).collect::<Vec<_>>()}),
        }
    }
}

impl Step {
    fn json(&self) -> Value {
        match self {
            Self::Digits => json!({"type": "Digits", "individual_digits": true}),
            Self::Expression(regex) => {
                json!({"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": false})
            }
            Self::Bytes(cut) => {
                json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": cut})
            }
        }
    }

    /// Returns true if a pre-tokenizer does the same.
    fn is(&self, json: &Value) -> bool {
        let flag = |key: &str, usual: bool| json[key].as_bool().unwrap_or(usual);
        match self {
            Self::Digits => json["type"] == "Digits" && flag("individual_digits", false),
            Self::Expression(regex) => {
                json["type"] == "Split"
                    && json["pattern"]["Regex"] == *regex
                    && json["behavior"] == "Isolated"
                    && !flag("invert", false)
            }
            Self::Bytes(cut) => {
                json["type"] == "ByteLevel" && !flag("add_prefix_space", true) && flag("use_regex", true) == *cut
            }
        }
    }
}

/// The steps of sequences within sequences.
fn flatten<'a>(json: &'a Value, steps: &mut Vec<&'a Value>) {
    match json["pretokenizers"].as_array().filter(|_| json["type"] == "Sequence") {
        Some(inner) => inner.iter().for_each(|step| flatten(step, steps)),
        None => steps.push(json),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_cut_is_found_by_what_it_writes() {
        for cut in &CUTS {
            assert_eq!(Cut::of_json(&cut.json()).unwrap().names, cut.names);
            assert_eq!(Cut::named(cut.names[0]).unwrap().names, cut.names);
        }
        assert!(Cut::of_json(&json!({"type": "Whitespace"})).is_none());
        assert!(Cut::of_json(&json!({"type": "ByteLevel"})).is_none(), "a space is put before the text");
        assert!(Cut::of_json(&Value::Null).is_none());
    }
}
