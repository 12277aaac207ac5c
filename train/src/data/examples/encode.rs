//! Conversion of a line of data to the tokens of an example.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::example::Example;
use super::options::{ExampleOptions, TooLong};
use crate::data::chat::refuse_weight;
use crate::data::json::Json;
use crate::data::{Conversation, DataError, Fields, IGNORE, Tokenizer};

/// Result of one line.
pub(super) enum Made {
    /// Complete example.
    Whole(Example),
    /// Truncated example.
    Cut(Example),
    /// No example: it is too long.
    Dropped,
}

pub(super) struct Encoder<'a> {
    options: &'a ExampleOptions<'a>,
    /// Tokenizer that recognises special tokens.
    special: Tokenizer,
}

/// Ids, and for each of them whether it is trained on.
type Learned = (Vec<u32>, Vec<bool>);

enum Problem {
    Line(String),
    Other(DataError),
}

impl From<DataError> for Problem {
    fn from(error: DataError) -> Self {
        Self::Other(error)
    }
}

impl From<String> for Problem {
    fn from(problem: String) -> Self {
        Self::Line(problem)
    }
}

impl<'a> Encoder<'a> {
    pub fn new(options: &'a ExampleOptions<'a>) -> Self {
        Self { options, special: options.tokenizer.with_special_tokens() }
    }

    /// Returns the example of a line.
    pub fn example(&self, line: &Json, path: &Path, number: u64) -> Result<Made, DataError> {
        self.made(line).map_err(|problem| match problem {
            Problem::Line(problem) => DataError::Example { path: PathBuf::from(path), line: number, problem },
            Problem::Other(error) => error,
        })
    }

    fn made(&self, line: &Json) -> Result<Made, Problem> {
        let ExampleOptions { learn_prompt, seq_len, length_key, vocab_size, too_long, .. } = self.options;
        let (ids, mut learned) = self.tokens(line)?;
        if *learn_prompt {
            learned.fill(true);
        }
        let (count, answer) = (ids.len(), learned.iter().position(|learned| *learned));
        if answer.is_none() {
            return Err(Problem::Line("has nothing to learn: no turn of the assistant".into()));
        }
        let long = count > seq_len + 1;
        match too_long {
            TooLong::Drop if long => return Ok(Made::Dropped),
            TooLong::Error if long => {
                return Err(Problem::Line(format!(
                    "has more than {} tokens, the most with {length_key} = {seq_len}; lengthen it, or set data.too_long = \"drop\"",
                    seq_len + 1
                )));
            }
            _ => {}
        }
        let example = Example { fields: self.fields(line), ..Example::new(ids, &learned, *seq_len) };
        let last = example.targets.iter().rfind(|target| **target != IGNORE);
        if let Some(id) = example.inputs.iter().chain(last).find(|id| **id as usize >= *vocab_size) {
            return Err(Problem::Line(format!(
                "has the token {id} (\"{}\"), for which the model's embedding of {vocab_size} rows has none; take it out of the data",
                self.special.token(*id as u32)
            )));
        }
        match (example.learned(), answer) {
            (0, Some(answer)) if answer > *seq_len => Err(Problem::Line(format!(
                "nothing is left to learn: its prompt alone has {} tokens, and {length_key} = {seq_len} cuts there; lengthen it, shorten the prompt, or set data.too_long = \"drop\"",
                if count > answer { answer.to_string() } else { format!("more than {seq_len}") }
            ))),
            (0, _) => Err(Problem::Line("has nothing to learn: no turn of the assistant".into())),
            _ if long => Ok(Made::Cut(example)),
            _ => Ok(Made::Whole(example)),
        }
    }

    /// Returns the requested fields of a line.
    fn fields(&self, line: &Json) -> Option<Arc<Fields>> {
        let found = |name: &String| Some((name.clone(), line.get(name)?.to_value()));
        let fields: Fields = self.options.fields.iter().filter_map(found).collect();
        (!fields.is_empty()).then(|| Arc::new(fields))
    }

    fn tokens(&self, line: &Json) -> Result<Learned, Problem> {
        let field = &self.options.source.field;
        refuse_weight(line)?;
        if let Some(messages) = line.get("messages") {
            return self.conversation(&Conversation::of_messages(messages, line)?);
        }
        if line.get("prompt").is_some() || line.get("completion").is_some() {
            let part = |key: &str| line.get(key).ok_or_else(|| format!("there is no field \"{key}\""));
            let (prompt, completion) = (part("prompt")?, part("completion")?);
            return match (prompt, completion) {
                (Json::Text(prompt), Json::Text(completion)) => self.pair(prompt, completion),
                (Json::List(_), _) | (_, Json::List(_)) => {
                    self.conversation(&Conversation::of_pair(prompt, completion, line)?)
                }
                _ => Err(instead_of_text(if prompt.text().is_some() {
                    ("completion", completion)
                } else {
                    ("prompt", prompt)
                })),
            };
        }
        match line.get(field) {
            Some(Json::Text(text)) => self.pair("", text),
            Some(other) => Err(instead_of_text((field, other))),
            None => {
                let known = format!("\"messages\", \"prompt\" with \"completion\", or \"{field}\"");
                Err(Problem::Line(match line {
                    Json::Object(entries) => {
                        let names: Vec<&str> = entries.iter().map(|(key, _)| key.as_str()).collect();
                        let names = if names.is_empty() { "none".into() } else { names.join(", ") };
                        format!("needs {known}; it has {names}")
                    }
                    _ => format!("is no object; it needs {known}"),
                }))
            }
        }
    }

    /// Encodes prompt and completion as one text, like Python's tokenizers: a token that reaches into the completion is
    /// trained on.
    fn pair(&self, prompt: &str, completion: &str) -> Result<Learned, Problem> {
        if completion.is_empty() {
            return Err(Problem::Line("has nothing to learn: its text or completion is empty".into()));
        }
        let ExampleOptions { tokenizer, end, seq_len, .. } = self.options;
        let spans = self.special.spans(&format!("{prompt}{completion}"), seq_len + 1)?;
        let (begin, after) = (tokenizer.begin(), tokenizer.end());
        let after = if after.last() == Some(end) { after.to_vec() } else { [after, &[*end]].concat() };
        let mut learned = vec![false; begin.len()];
        learned.extend(spans.iter().map(|(_, span)| span.end > prompt.len()));
        learned.resize(learned.len() + after.len(), true);
        let ids = begin.iter().copied().chain(spans.into_iter().map(|(id, _)| id)).chain(after).collect();
        Ok((ids, learned))
    }

    fn conversation(&self, conversation: &Conversation) -> Result<Learned, Problem> {
        let Some(template) = self.options.template else {
            return Err(Problem::Line(
                "has messages, but the model has no chat template; give `prompt` and `completion`".into(),
            ));
        };
        let written = template.write(conversation)?;
        let spans = self.special.spans(&written.text, self.options.seq_len + 1)?;
        let mut answers = written.answers.iter().peekable();
        let mut learned = Vec::with_capacity(spans.len());
        for (_, span) in &spans {
            while answers.next_if(|answer| answer.end <= span.start).is_some() {}
            learned.push(answers.peek().is_some_and(|answer| span.start < answer.end && span.end > answer.start));
        }
        let mut ids: Vec<u32> = spans.into_iter().map(|(id, _)| id).collect();
        if ids.len() > self.options.seq_len && !learned.contains(&true) && !written.answers.is_empty() {
            // The answers lie in what was not encoded; their first token stands for them.
            ids.push(self.options.end);
            learned.push(true);
        }
        Ok((ids, learned))
    }
}

fn instead_of_text((field, value): (&str, &Json)) -> Problem {
    Problem::Line(format!("field \"{field}\" is {value} instead of a text"))
}
