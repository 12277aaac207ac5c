//! Examples with the lines that they come from, and questions with choices.

use std::path::Path;
use std::sync::Arc;

use super::encode::{Encoder, Made};
use super::example::Example;
use super::options::ExampleOptions;
use crate::data::json::Json;
use crate::data::json_lines::JsonLines;
use crate::data::{DataError, Source};

/// Place of a line in the data.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Location {
    /// The file.
    pub path: Arc<Path>,
    /// Line number from 1.
    pub line: u64,
}

/// An example and its line.
#[derive(Clone, Debug)]
pub struct Located {
    /// Its line.
    pub location: Location,
    /// The example.
    pub example: Example,
}

/// A question with several answers, one of them right.
#[derive(Clone, Debug)]
pub struct Question {
    /// Its line.
    pub location: Location,
    /// Each answer, and the question with that answer.
    pub choices: Vec<(String, Example)>,
    /// Number of the right answer, from 0.
    pub answer: usize,
}

/// Numbers of the lines that [`each_example`] or [`each_question`] has read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Read {
    /// Examples.
    pub examples: u64,
    /// Lines that were left out for their length.
    pub dropped: u64,
    /// Examples that were cut.
    pub cut: u64,
}

/// Reads the examples of a source in order; none stays in memory.
pub fn each_example<E: From<DataError>>(
    options: &ExampleOptions,
    mut each: impl FnMut(Located) -> Result<(), E>,
) -> Result<Read, E> {
    let encoder = Encoder::new(options);
    let mut read = Read::default();
    each_line(options.source, |location, line| {
        let example = match encoder.example(line, &location.path, location.line)? {
            Made::Whole(example) => example,
            Made::Cut(example) => {
                read.cut += 1;
                example
            }
            Made::Dropped => {
                read.dropped += 1;
                return Ok(());
            }
        };
        read.examples += 1;
        each(Located { location, example })
    })?;
    Ok(read)
}

/// Reads the questions of a source in order: lines with `prompt` (a text, or turns) or `messages`, the texts `choices`,
/// and `answer`, the number of the right one from 0, or its text. None stays in memory.
pub fn each_question<E: From<DataError>>(
    options: &ExampleOptions,
    mut each: impl FnMut(Question) -> Result<(), E>,
) -> Result<Read, E> {
    let encoder = Encoder::new(options);
    let mut read = Read::default();
    each_line(options.source, |location, line| {
        let bad =
            |problem: String| DataError::Example { path: location.path.to_path_buf(), line: location.line, problem };
        let (texts, answer) = choices(line).map_err(bad)?;
        let mut choices = Vec::with_capacity(texts.len());
        for text in texts {
            let with = answered(line, text).map_err(bad)?;
            match encoder.example(&with, &location.path, location.line)? {
                Made::Whole(example) => choices.push((text.to_string(), example)),
                Made::Cut(_) | Made::Dropped => {
                    return Err(
                        bad("is too long: a part of a question cannot be answered; raise --seq-len".into()).into()
                    );
                }
            }
        }
        read.examples += 1;
        each(Question { location: location.clone(), choices, answer })
    })?;
    Ok(read)
}

fn each_line<E: From<DataError>>(
    source: &Source,
    mut each: impl FnMut(Location, &Json) -> Result<(), E>,
) -> Result<(), E> {
    let mut read = 0;
    for (path, _) in source.files()?.0 {
        let shared: Arc<Path> = Arc::from(path.as_path());
        let mut lines = JsonLines::open(path)?;
        while let Some((line, value)) = lines.next_value()? {
            read += 1;
            each(Location { path: shared.clone(), line }, &value)?;
        }
    }
    match read {
        0 => {
            let paths: Vec<String> = source.paths.iter().map(|path| path.display().to_string()).collect();
            Err(DataError::Empty { paths: paths.join(", "), skipped: "there is no line".into() }.into())
        }
        _ => Ok(()),
    }
}

/// The answers of a line, and the number of the right one.
fn choices(line: &Json) -> Result<(Vec<&str>, usize), String> {
    let list = line.get("choices").and_then(Json::list).ok_or("needs \"choices\", a list of texts")?;
    let texts: Option<Vec<&str>> = list.iter().map(Json::text).collect();
    let texts = texts.filter(|texts| texts.len() > 1 && texts.iter().all(|text| !text.is_empty()));
    let texts = texts.ok_or("\"choices\" must be at least two texts, none of them empty")?;
    let answer = line.get("answer").ok_or("needs \"answer\", the number of the right choice from 0, or its text")?;
    let number = match answer {
        Json::Number(number) => number.as_u64().and_then(|number| usize::try_from(number).ok()),
        Json::Text(text) => texts.iter().position(|choice| choice == text),
        _ => None,
    };
    match number.filter(|number| *number < texts.len()) {
        Some(number) => Ok((texts, number)),
        None => Err(format!("\"answer\" is {answer}; it must be from 0 to {}, or one of the choices", texts.len() - 1)),
    }
}

/// The line as an example whose completion is an answer.
fn answered(line: &Json, text: &str) -> Result<Json, String> {
    let turns = |prompt: &Json| {
        let turn =
            [("role", "assistant"), ("content", text)].map(|(key, value)| (key.into(), Json::Text(value.into())));
        (prompt.clone(), Json::List(vec![Json::Object(turn.into())]))
    };
    let (prompt, completion) = match (line.get("messages"), line.get("prompt")) {
        (Some(messages), _) => turns(messages),
        (None, Some(prompt @ Json::List(_))) => turns(prompt),
        (None, Some(prompt)) => (prompt.clone(), Json::Text(text.into())),
        (None, None) => return Err("needs \"prompt\" or \"messages\" before the choices".into()),
    };
    let others = match line {
        Json::Object(entries) => entries.clone(),
        _ => Vec::new(),
    };
    let others = others.into_iter().filter(|(key, _)| !["messages", "prompt", "completion"].contains(&key.as_str()));
    let own = [("prompt".to_string(), prompt), ("completion".to_string(), completion)];
    Ok(Json::Object(own.into_iter().chain(others).collect()))
}
