//! Conversations in lines of data.

use super::super::json::Json;

/// Turns, other variables of the template, and the turns that are trained on.
#[derive(Clone, Debug, PartialEq)]
pub struct Conversation {
    /// Turns, as passed to the template.
    pub(super) messages: Vec<Json>,
    /// Further variables of the template, such as `tools`.
    pub(super) variables: Vec<(String, Json)>,
    /// True for each turn that is trained on.
    pub(super) counts: Vec<bool>,
    /// Number of turns before the completion, if the line separates prompt and completion.
    pub(super) prompt: Option<usize>,
}

/// Key by which data marks trained turns, as a number or as a flag.
const WEIGHT: &str = "weight";
const TRAIN: [&str; 2] = ["train", "training"];
/// Another such key of a turn.
const LOSS: &str = "loss";
/// Variables of a template that a line may have in addition to the turns.
const VARIABLES: [&str; 2] = ["tools", "documents"];
const MORE_VARIABLES: &str = "chat_template_kwargs";

impl Conversation {
    /// Reads the turns `messages` of a line: the assistant's turns are trained on.
    pub fn of_messages(messages: &Json, line: &Json) -> Result<Self, String> {
        let messages = turns(messages, "messages")?;
        if messages.is_empty() {
            return Err("messages must be a list of turns".into());
        }
        let counts = messages.iter().enumerate().map(|(turn, message)| counts(turn, message, is_assistant(message)));
        Ok(Self { counts: counts.collect::<Result<_, _>>()?, messages, variables: variables(line)?, prompt: None })
    }

    /// Reads turns in `prompt` and `completion`: the completion's turns are trained on.
    pub fn of_pair(prompt: &Json, completion: &Json, line: &Json) -> Result<Self, String> {
        let (mut messages, completion) = (turns(prompt, "prompt")?, turns(completion, "completion")?);
        if messages.is_empty() || completion.is_empty() {
            return Err("prompt and completion must be lists of turns, none of them empty".into());
        }
        let first = messages.len();
        messages.extend(completion);
        let counts = messages.iter().enumerate().map(|(turn, message)| counts(turn, message, turn >= first));
        let counts: Vec<bool> = counts.collect::<Result<_, _>>()?;
        if let Some(turn) = counts[..first].iter().position(|counts| *counts) {
            return Err(format!(
                "turn {} of the prompt is to be learned; turns that are learned stand in the completion",
                turn + 1
            ));
        }
        Ok(Self { messages, variables: variables(line)?, counts, prompt: Some(first) })
    }

    /// Creates a conversation of a question, after an optional system message.
    pub fn asking(system: Option<&str>, question: &str) -> Self {
        let mut conversation = Self::new(system);
        conversation.push("user", question);
        conversation
    }

    /// Creates a conversation without turns, after an optional system message.
    pub fn new(system: Option<&str>) -> Self {
        let mut conversation = Self { messages: Vec::new(), variables: Vec::new(), counts: Vec::new(), prompt: None };
        if let Some(text) = system {
            conversation.push("system", text);
        }
        conversation
    }

    /// Appends a turn, which is not trained on.
    pub fn push(&mut self, role: &str, content: &str) {
        let text = |text: &str| Json::Text(text.to_string());
        self.messages.push(Json::Object(vec![("role".into(), text(role)), ("content".into(), text(content))]));
        self.counts.push(false);
    }

    /// Reads a file: a list of turns, or an object with `messages`.
    pub fn of_file(json: &Json) -> Result<Self, String> {
        Self::of_messages(json.get("messages").unwrap_or(json), json)
    }
}

pub(super) fn is_assistant(message: &Json) -> bool {
    message.get("role").and_then(Json::text) == Some("assistant")
}

/// Checks turns as far as every template requires: content may be a text, a list of parts, or null, as in turns that
/// call tools.
fn turns(value: &Json, field: &str) -> Result<Vec<Json>, String> {
    let Some(messages) = value.list() else {
        return Err(format!("{field} must be a list of turns; it is {value}"));
    };
    for (turn, message) in messages.iter().enumerate() {
        let turn = turn + 1;
        if message.get("role").and_then(Json::text).is_none() {
            return Err(format!("turn {turn} of {field} needs the text \"role\""));
        }
        match message.get("content") {
            Some(Json::Text(_) | Json::List(_) | Json::Null) => {}
            None if message.get("tool_calls").is_some() => {}
            None => return Err(format!("turn {turn} of {field} has no \"content\"")),
            Some(other) => {
                return Err(format!(
                    "the \"content\" of turn {turn} of {field} is {other}; it must be a text, a list of parts or null"
                ));
            }
        }
    }
    Ok(messages.to_vec())
}

/// Rejects a line that itself says how much it counts: turns do, lines cannot.
pub(in crate::data) fn refuse_weight(line: &Json) -> Result<(), String> {
    for key in [WEIGHT].iter().chain(&TRAIN) {
        let counts = match line.get(key) {
            Some(Json::Bool(flag)) => *flag,
            Some(Json::Number(number)) => number.as_f64() == Some(1.0),
            _ => true,
        };
        if !counts {
            return Err(format!(
                "\"{key}\" of the line is {}; lines count wholly: leave the line out, or rename the key if it means something else",
                line.get(key).unwrap_or(&Json::Null)
            ));
        }
    }
    Ok(())
}

/// Returns true if a turn is trained on; `usual` is the default if the turn itself does not specify it.
fn counts(turn: usize, message: &Json, usual: bool) -> Result<bool, String> {
    let mut said = None;
    let flag = |key: &str, value: &Json| match value {
        Json::Null => Ok(None),
        Json::Bool(flag) => Ok(Some(*flag)),
        Json::Number(number) if number.as_f64() == Some(0.0) => Ok(Some(false)),
        Json::Number(number) if number.as_f64() == Some(1.0) => Ok(Some(true)),
        other => Err(format!("\"{key}\" of turn {} is {other}; a turn counts wholly (1) or not (0)", turn + 1)),
    };
    for key in [WEIGHT, LOSS].iter().chain(&TRAIN) {
        if let Some(value) = message.get(key) {
            said = flag(key, value)?.or(said);
        }
    }
    match said {
        Some(true) if !usual && !is_assistant(message) => Err(format!(
            "turn {} is to be learned, but it is not the assistant's; put it into \"completion\", or set data.learn_prompt",
            turn + 1
        )),
        Some(said) => Ok(said),
        None => Ok(usual),
    }
}

/// Reads the variables of the template in a line.
fn variables(line: &Json) -> Result<Vec<(String, Json)>, String> {
    let mut variables = Vec::new();
    for key in VARIABLES {
        match line.get(key) {
            // Data sets with typed columns store them as JSON text.
            Some(Json::Text(text)) => {
                let value = serde_json::from_str(text).map_err(|error| format!("\"{key}\" is not JSON: {error}"))?;
                variables.push((key.to_string(), value));
            }
            Some(Json::Null) | None => {}
            Some(value @ Json::List(_)) => variables.push((key.to_string(), value.clone())),
            Some(other) => return Err(format!("\"{key}\" is {other}; it must be a list")),
        }
    }
    match line.get(MORE_VARIABLES) {
        Some(Json::Object(more)) => variables.extend(more.iter().cloned()),
        Some(Json::Null) | None => {}
        Some(other) => return Err(format!("\"{MORE_VARIABLES}\" is {other}; it must be an object")),
    }
    Ok(variables)
}
