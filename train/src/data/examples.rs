//! Examples to fine-tune on, from JSON lines.
//!
//! A line is an object with `messages` (turns with `role` and `content`, written by the model's chat template), with `prompt` and `completion`, or
//! with a text. What the model is to write counts: completions and the assistant's turns with what ends them, and whole texts.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use rayon::prelude::*;
use serde_json::Value;
use sha2::{Digest, Sha256};

use super::json_lines::JsonLines;
use super::split::held_out;
use super::{ChatTemplate, DataError, Fields, Format, IGNORE, Source, Tokenizer};

/// Tokens of one example.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Example {
    /// Tokens but the last.
    pub inputs: Vec<i32>,
    /// The token that follows each input, or [`IGNORE`].
    pub targets: Vec<i32>,
    /// Fields that were asked for, of those that its line has beside the text; none when it has none of them.
    pub fields: Option<Arc<Fields>>,
}

/// Tokens that a model begins and ends texts with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Marks {
    /// Before each text, where the model wants one.
    pub begin: Option<u32>,
    /// After each completion and text.
    pub end: u32,
}

/// What to make examples from.
#[derive(Debug)]
pub struct ExampleOptions<'a> {
    /// JSON lines; `field` is that of texts.
    pub source: &'a Source,
    /// The model's tokenizer.
    pub tokenizer: &'a Tokenizer,
    /// The model's chat template, where it has one.
    pub template: Option<&'a ChatTemplate>,
    /// The model's marks.
    pub marks: Marks,
    /// Whether prompts and the other turns count too.
    pub learn_prompt: bool,
    /// Most inputs of an example; longer ones are cut.
    pub seq_len: usize,
    /// Part of the examples held out, between 0 and 1.
    pub validation_fraction: f64,
    /// Seed of the choice of what is held out.
    pub seed: u64,
    /// Names of the fields that an objective asks for; others are not kept.
    pub fields: &'a [String],
}

/// All examples.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Examples {
    /// To learn from.
    pub train: Vec<Example>,
    /// Held out.
    pub validation: Vec<Example>,
    /// How many were cut.
    pub truncated: usize,
}

/// Lines that are turned into tokens together.
const TOGETHER: usize = 4096;

impl Example {
    /// The tokens `ids`, of which those where `learned` count, cut to `seq_len` inputs.
    fn new(mut ids: Vec<u32>, learned: &[bool], seq_len: usize) -> Self {
        ids.truncate(seq_len + 1);
        let target = |(id, learned): (&u32, &bool)| if *learned { *id as i32 } else { IGNORE };
        Self {
            inputs: ids[..ids.len().saturating_sub(1)].iter().map(|id| *id as i32).collect(),
            targets: ids.iter().zip(learned).skip(1).map(target).collect(),
            fields: None,
        }
    }

    /// Targets that count.
    pub fn learned(&self) -> usize {
        self.targets.iter().filter(|target| **target != IGNORE).count()
    }

    /// The inputs before the first target that counts: what the model has seen when it begins to write.
    pub fn prompt(&self) -> &[i32] {
        let first = self.targets.iter().position(|target| *target != IGNORE);
        &self.inputs[..first.map_or(self.inputs.len(), |first| first + 1)]
    }
}

impl Examples {
    /// Reads all examples. A line that is none, and one with nothing to learn, is refused with file and line.
    pub fn read(options: &ExampleOptions) -> Result<Self, DataError> {
        if !matches!(options.source.format, Format::Auto | Format::Jsonl) {
            return Err(DataError::Setting {
                key: "data.format",
                value: format!("{:?}", options.source.format).to_lowercase(),
                problem: "examples to fine-tune on are JSON lines; set it to jsonl".into(),
            });
        }
        let (files, _) = options.source.files()?;
        let encoder = Encoder { options, special: options.tokenizer.for_templates() };
        let mut texts = Vec::new();
        let mut read = Vec::new();
        let mut truncated = 0;
        for (path, _) in files {
            let mut lines = JsonLines::open(path)?;
            loop {
                let mut group = Vec::new();
                while group.len() < TOGETHER
                    && let Some(line) = lines.next()?
                {
                    group.push(line);
                }
                if group.is_empty() {
                    break;
                }
                let made: Vec<Result<(Example, bool), DataError>> = group
                    .par_iter()
                    .map(|(line, value)| {
                        encoder.example(value).map_err(|problem| refused(lines.path(), *line, problem))
                    })
                    .collect();
                for example in made {
                    let (example, cut) = example?;
                    truncated += usize::from(cut);
                    read.push(example);
                }
                texts.extend(group.into_iter().map(|(_, value)| value.to_string()));
            }
        }
        if read.is_empty() {
            let paths: Vec<String> = options.source.paths.iter().map(|path| path.display().to_string()).collect();
            return Err(DataError::Empty { paths: paths.join(", "), skipped: "there is no line".into() });
        }
        let sides = held_out(&texts, options.validation_fraction, options.seed)?;
        let mut examples = Self { truncated, ..Self::default() };
        for (example, held_out) in read.into_iter().zip(sides) {
            match held_out {
                true => examples.validation.push(example),
                false => examples.train.push(example),
            }
        }
        Ok(examples)
    }

    /// SHA-256 of the training examples in hexadecimal digits.
    pub fn fingerprint(&self) -> String {
        let mut hasher = Sha256::new();
        for example in &self.train {
            hasher.update((example.inputs.len() as u64).to_le_bytes());
            for value in example.inputs.iter().chain(&example.targets) {
                hasher.update(value.to_le_bytes());
            }
        }
        format!("{:x}", hasher.finalize())
    }
}

fn refused(path: &Path, line: u64, problem: Problem) -> DataError {
    match problem {
        Problem::Line(problem) => DataError::Example { path: PathBuf::from(path), line, problem },
        Problem::Other(error) => error,
    }
}

enum Problem {
    Line(String),
    Other(DataError),
}

impl From<DataError> for Problem {
    fn from(error: DataError) -> Self {
        Self::Other(error)
    }
}

struct Encoder<'a> {
    options: &'a ExampleOptions<'a>,
    /// The tokenizer in which special tokens mean what they say.
    special: Tokenizer,
}

impl Encoder<'_> {
    /// The example of a line, and whether it was cut.
    fn example(&self, value: &Value) -> Result<(Example, bool), Problem> {
        let ExampleOptions { learn_prompt, seq_len, source, .. } = self.options;
        let (ids, mut learned) = if let Some(messages) = value.get("messages") {
            self.conversation(messages)?
        } else if value.get("prompt").is_some() || value.get("completion").is_some() {
            self.pair(text_of(value, "prompt")?, text_of(value, "completion")?)?
        } else if value.get(&source.field).is_some() {
            self.pair("", text_of(value, &source.field)?)?
        } else {
            let known = format!("\"messages\", \"prompt\" with \"completion\", or \"{}\"", source.field);
            return Err(Problem::Line(match value.as_object() {
                Some(object) => {
                    let names: Vec<&str> = object.keys().map(String::as_str).collect();
                    format!("needs {known}; it has {}", if names.is_empty() { "none".into() } else { names.join(", ") })
                }
                None => format!("is no object; it needs {known}"),
            }));
        };
        if *learn_prompt {
            learned.fill(true);
        }
        let (count, answer) = (ids.len(), learned.iter().position(|learned| *learned));
        let example = Example { fields: self.fields(value), ..Example::new(ids, &learned, *seq_len) };
        match example.learned() {
            0 => Err(Problem::Line(match answer {
                Some(answer) if answer > *seq_len => format!(
                    "nothing is left to learn: its prompt alone has {answer} tokens, and train.seq_len = {seq_len} cuts there; lengthen it or shorten the prompt"
                ),
                _ => "has nothing to learn: no turn of the assistant".into(),
            })),
            _ => Ok((example, count > seq_len + 1)),
        }
    }

    /// The fields of a line that are asked for.
    fn fields(&self, value: &Value) -> Option<Arc<Fields>> {
        let found = |name: &String| Some((name.clone(), value.get(name)?.clone()));
        let fields: Fields = self.options.fields.iter().filter_map(found).collect();
        (!fields.is_empty()).then(|| Arc::new(fields))
    }

    fn pair(&self, prompt: &str, completion: &str) -> Result<(Vec<u32>, Vec<bool>), Problem> {
        if completion.is_empty() {
            return Err(Problem::Line("has nothing to learn: its text or completion is empty".into()));
        }
        let ExampleOptions { tokenizer, marks, .. } = self.options;
        let mut ids: Vec<u32> = marks.begin.into_iter().collect();
        ids.extend(tokenizer.encode(prompt)?);
        let mut learned = vec![false; ids.len()];
        ids.extend(tokenizer.encode(completion)?);
        ids.push(marks.end);
        learned.resize(ids.len(), true);
        Ok((ids, learned))
    }

    fn conversation(&self, messages: &Value) -> Result<(Vec<u32>, Vec<bool>), Problem> {
        let wrong = |problem: String| Problem::Line(problem);
        let Some(template) = self.options.template else {
            return Err(wrong(
                "has messages, but the model has no chat template; give `prompt` and `completion`".into(),
            ));
        };
        let Some(messages) = messages.as_array().filter(|messages| !messages.is_empty()) else {
            return Err(wrong("messages must be a list of turns".into()));
        };
        for (turn, message) in messages.iter().enumerate() {
            for key in ["role", "content"] {
                if !message[key].is_string() {
                    return Err(wrong(format!("turn {} of messages needs the text \"{key}\"", turn + 1)));
                }
            }
        }
        let written = template.write(messages).map_err(wrong)?;
        let tokens = self.special.encode_at(&written.text)?;
        let learned = |at: usize| written.answers.iter().any(|answer| answer.contains(&at));
        let learned = tokens.iter().map(|(_, at)| learned(*at)).collect();
        Ok((tokens.into_iter().map(|(id, _)| id).collect(), learned))
    }
}

fn text_of<'a>(value: &'a Value, field: &str) -> Result<&'a str, Problem> {
    match value.get(field) {
        Some(Value::String(text)) => Ok(text),
        Some(other) => Err(Problem::Line(format!("field \"{field}\" is {other} instead of a text"))),
        None => Err(Problem::Line(format!("there is no field \"{field}\""))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEMPLATE: &str = "{% for m in messages %}{{ m.role + ':' + m.content + eos_token }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}";

    struct Bench {
        dir: tempfile::TempDir,
        tokenizer: Tokenizer,
        template: ChatTemplate,
    }

    impl Bench {
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            std::fs::write(dir.path().join("chat_template.jinja"), TEMPLATE).unwrap();
            std::fs::write(dir.path().join("tokenizer_config.json"), r#"{"eos_token": "<|endoftext|>"}"#).unwrap();
            let template = ChatTemplate::read(dir.path()).unwrap().unwrap();
            Self { dir, tokenizer: Tokenizer::bytes().unwrap(), template }
        }

        fn read(&self, lines: &[&str], change: impl FnOnce(&mut ExampleOptions)) -> Result<Examples, DataError> {
            let path = self.dir.path().join("train.jsonl");
            std::fs::write(&path, lines.join("\n")).unwrap();
            let source = Source { paths: vec![path], format: Format::Auto, field: "text".into() };
            let mut options = ExampleOptions {
                source: &source,
                tokenizer: &self.tokenizer,
                template: Some(&self.template),
                marks: Marks { begin: Some(256), end: 256 },
                learn_prompt: false,
                seq_len: 64,
                validation_fraction: 0.2,
                seed: 1,
                fields: &[],
            };
            change(&mut options);
            Examples::read(&options)
        }

        /// The example of the first line, whichever side it is on.
        fn first(&self, line: &str, change: impl FnOnce(&mut ExampleOptions)) -> Example {
            let examples = self.read(&[line, r#"{"text": "another"}"#], change).unwrap();
            let other = "another".len() + 1;
            let mut all = examples.train.into_iter().chain(examples.validation);
            all.find(|example| example.inputs.len() != other).unwrap()
        }

        fn text(&self, ids: impl Iterator<Item = i32>) -> String {
            ids.map(|id| if id == 256 { '|' } else { char::from(id as u8) }).collect()
        }
    }

    #[test]
    fn completions_texts_and_answers_count_and_nothing_else() {
        let bench = Bench::new();
        let shown = |line: &str| {
            let example = bench.first(line, |_| ());
            let learned = bench.text(example.targets.iter().copied().filter(|target| *target != IGNORE));
            (bench.text(example.inputs.iter().copied()), learned, bench.text(example.prompt().iter().copied()))
        };
        let texts = |a: &str, b: &str, c: &str| (a.to_string(), b.to_string(), c.to_string());
        assert_eq!(shown(r#"{"prompt": "1+1=", "completion": "2"}"#), texts("|1+1=2", "2|", "|1+1="));
        assert_eq!(shown(r#"{"text": "hello"}"#), texts("|hello", "hello|", "|"));
        let chat = r#"{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}, {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}"#;
        let text = "user:hi|assistant:ho|user:a|assistant:b";
        assert_eq!(shown(chat), texts(text, "ho|b|", "user:hi|assistant:"));
        let all = bench.first(r#"{"prompt": "1+1=", "completion": "2"}"#, |options| options.learn_prompt = true);
        assert_eq!(bench.text(all.targets.iter().copied()), "1+1=2|");
    }

    #[test]
    fn fields_are_kept_where_they_are_asked_for_and_change_nothing_else() {
        let bench = Bench::new();
        let line = r#"{"prompt": "1+1=", "completion": "2", "client": 7, "label": "sum", "note": "x"}"#;
        let names = ["client".to_string(), "label".to_string(), "domain".to_string()];
        let kept = |names: &[String]| bench.first(line, |options| options.fields = names.to_vec().leak());
        let (plain, tagged) = (kept(&[]), kept(&names));
        assert_eq!(plain.fields, None);
        let fields = tagged.fields.clone().unwrap();
        assert_eq!((fields.len(), &fields["client"], &fields["label"]), (2, &7.into(), &"sum".into()));
        assert_eq!(Example { fields: None, ..tagged }, plain);
    }

    #[test]
    fn the_targets_follow_the_inputs_and_long_examples_are_cut_and_counted() {
        let bench = Bench::new();
        let lines = [r#"{"prompt": "abc", "completion": "defghijkl"}"#, r#"{"text": "short"}"#];
        let examples = bench.read(&lines, |options| options.seq_len = 6).unwrap();
        assert_eq!(examples.truncated, 1);
        for example in examples.train.iter().chain(&examples.validation) {
            assert!(example.inputs.len() <= 6 && example.inputs.len() == example.targets.len());
            let pairs = example.inputs[1..].iter().zip(&example.targets);
            assert!(pairs.into_iter().all(|(input, target)| *target == IGNORE || input == target));
        }
    }

    #[test]
    fn lines_that_are_no_examples_are_refused_by_file_and_line() {
        let bench = Bench::new();
        let good = r#"{"text": "fine"}"#;
        let message = |line: &str| {
            let message = bench.read(&[good, "", line], |options| options.seq_len = 8).unwrap_err().to_string();
            assert!(message.contains("train.jsonl line 3"), "{message}");
            message
        };
        for (line, part) in [
            (r#"{"body": "x"}"#, "it has body"),
            (r#"["x"]"#, "no object"),
            (r#"{"prompt": "x"}"#, "completion"),
            (r#"{"prompt": 3, "completion": "x"}"#, "3 instead of a text"),
            (r#"{"prompt": "x", "completion": ""}"#, "empty"),
            (r#"{"text": ""}"#, "empty"),
            (r#"{"prompt": "0123456789", "completion": "x"}"#, "11 tokens"),
            (r#"{"messages": []}"#, "list of turns"),
            (r#"{"messages": [{"role": "user"}]}"#, "content"),
            (r#"{"messages": [{"role": "user", "content": "x"}]}"#, "assistant"),
            (r#"{"text": "cut"#, "not valid JSON"),
        ] {
            assert!(message(line).contains(part), "{line}: {}", message(line));
        }
        let chat = r#"{"messages": [{"role": "assistant", "content": "x"}]}"#;
        let message = bench.read(&[chat, good], |options| options.template = None).unwrap_err().to_string();
        assert!(message.contains("line 1") && message.contains("no chat template"), "{message}");
        let message = bench.read(&[good, good], |_| ()).unwrap_err().to_string();
        assert!(message.contains("2 examples, all the same"), "{message}");
        assert!(bench.read(&[], |_| ()).unwrap_err().to_string().contains("train.jsonl"));
    }

    #[test]
    fn a_part_is_held_out_by_its_own_text() {
        let bench = Bench::new();
        let lines: Vec<String> = (0..200).map(|number| format!("{{\"text\": \"number {number}\"}}")).collect();
        let lines: Vec<&str> = lines.iter().map(String::as_str).collect();
        let all = bench.read(&lines, |_| ()).unwrap();
        assert!((20..60).contains(&all.validation.len()), "{}", all.validation.len());
        let fewer = bench.read(&lines[..100], |_| ()).unwrap();
        assert!(fewer.validation.iter().all(|example| all.validation.contains(example)));
        assert_eq!(all.fingerprint(), bench.read(&lines, |_| ()).unwrap().fingerprint());
        assert_ne!(all.fingerprint(), fewer.fingerprint());
    }
}
