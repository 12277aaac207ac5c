//! Chat templates: the format of a model's conversations.

mod conversation;
mod methods;
mod python;
mod syntax;

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::Duration;

use lowrank_models::hub::{CHAT_TEMPLATE, FURTHER_TEMPLATES};
use minijinja::syntax::SyntaxConfig;
use minijinja::value::Kwargs;
use minijinja::{Environment, Error, ErrorKind, State, Value as Jinja};
use serde_json::Value;

pub use conversation::Conversation;
pub(super) use conversation::refuse_weight;

use self::conversation::is_assistant;
use super::DataError;
use super::json::Json;
use super::model_file::model_text;
use super::special_tokens::{SpecialTokens, TOKENIZER_CONFIG, json_file};

/// Template of a model folder: `chat_template.jinja`, or `chat_template` of `tokenizer_config.json`.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Arc<Environment<'static>>,
    /// Texts of special tokens by their keys.
    tokens: Vec<(String, String)>,
    /// File that holds it, for refusals.
    path: PathBuf,
    /// True if the template itself marks the assistant's text, by `{% generation %}`.
    marks: bool,
}

/// Conversation written by the template.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Written {
    pub text: String,
    /// Byte ranges of the trained turns, including their end tokens.
    pub answers: Vec<Range<usize>>,
}

/// Name of the template that is used where no other is asked for.
const DEFAULT: &str = "default";
/// Name of the template, and of the one for conversations with tools where there is one.
const PLAIN: &str = "chat";
const WITH_TOOLS: &str = "tool_use";
/// Maximum size of a template in bytes.
const MOST_BYTES: usize = 1 << 17;
/// Stack of the threads that compile and run a template: expressions may be nested as deeply as a template has bytes, and values as deeply as it has
/// instructions.
const STACK: usize = 512 << 20;
/// Instruction limit of one rendering; 64 bytes of text cost as much as one.
const FUEL: u64 = 5_000_000;
/// Time limit of one rendering, for what takes no instructions: comparing and joining values.
const TIME: Duration = Duration::from_secs(if cfg!(test) { 5 } else { 10 });
/// Maximum nesting of macros and blocks.
const RECURSION: usize = 200;
/// Marks around the assistant's text; these are noncharacters that no Unicode text contains.
const MARKS: [char; 2] = ['\u{fdd0}', '\u{fdd1}'];

impl ChatTemplate {
    /// Reads the template of a folder; none if the folder has none.
    pub fn read(dir: &Path) -> Result<Option<Self>, DataError> {
        let (path, config) = (dir.join(CHAT_TEMPLATE), dir.join(TOKENIZER_CONFIG));
        let bad = |path: &Path, problem: String| DataError::Template { path: path.to_path_buf(), problem };
        let settings = json_file(&config)?;
        // Files come before the settings, as in `transformers`.
        let further = |name: &str| model_text(&dir.join(FURTHER_TEMPLATES).join(format!("{name}.jinja")));
        let own = match model_text(&path)? {
            Some(own) => Some(own),
            None => further(DEFAULT)?,
        };
        let stated = |name: &str| match &settings["chat_template"] {
            Value::String(source) => (name == DEFAULT).then(|| source.clone()),
            Value::Array(named) => {
                let one = named.iter().find(|one| one["name"] == name)?;
                one["template"].as_str().map(str::to_string)
            }
            named => named[name].as_str().map(str::to_string),
        };
        let in_files = own.is_some() || dir.join(FURTHER_TEMPLATES).exists();
        let (from, plain, with_tools) = match in_files {
            true => (&path, own, further(WITH_TOOLS)?),
            false => (&config, stated(DEFAULT), stated(WITH_TOOLS)),
        };
        let Some(plain) = plain else {
            if !in_files && settings["chat_template"].is_null() {
                return Ok(None);
            }
            return Err(bad(from, "has several chat templates, but none named \"default\"".into()));
        };
        let with_tools = with_tools.map(|source| (WITH_TOOLS, source));
        let sources = [(PLAIN, plain)].into_iter().chain(with_tools).collect();
        let SpecialTokens { texts, more, .. } = SpecialTokens::read(dir)?;
        let tokens = texts.into_iter().map(|(key, text)| (key.to_string(), text)).chain(more).collect();
        Self::new(sources, tokens, from)
            .map(Some)
            .map_err(|error| bad(from, format!("the chat template cannot be read: {error:#}")))
    }

    fn new(sources: Vec<(&'static str, String)>, tokens: Vec<(String, String)>, path: &Path) -> Result<Self, Error> {
        let mut environment = Environment::new();
        // Same Jinja settings as `transformers`.
        environment.set_syntax(SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?);
        environment.set_unknown_method_callback(methods::method);
        environment.set_formatter(python::write);
        environment.add_filter("tojson", python::tojson);
        environment.add_test("sequence", python::is_sequence);
        environment.add_filter("indent", methods::indent);
        environment.add_function("raise_exception", |message: String| -> Result<Jinja, Error> {
            Err(Error::new(ErrorKind::InvalidOperation, message))
        });
        environment.add_function("strftime_now", |format: String| python::strftime_now(&format));
        environment.add_function("__generation", marked);
        // A template comes with a model of any origin: its resources are limited whatever it contains.
        environment.set_fuel(Some(FUEL));
        environment.set_recursion_limit(RECURSION);
        let (mut marks, mut compiled) = (false, Vec::new());
        for (name, source) in sources {
            if source.len() > MOST_BYTES {
                let problem = format!("it has {} bytes, more than the {MOST_BYTES} that are allowed", source.len());
                return Err(Error::new(ErrorKind::SyntaxError, problem));
            }
            // As Jinja reads it.
            let (source, found) = syntax::adapted(&source.replace("\r\n", "\n").replace('\r', "\n"))
                .map_err(|problem| Error::new(ErrorKind::SyntaxError, problem))?;
            marks |= found;
            compiled.push((name, source));
        }
        let compile = move || -> Result<Environment<'static>, Error> {
            for (name, source) in compiled {
                environment.add_template_owned(name, source)?;
            }
            Ok(environment)
        };
        let failed = |what: String| Error::new(ErrorKind::InvalidOperation, what);
        let thread = std::thread::Builder::new().stack_size(STACK).spawn(compile);
        let thread = thread.map_err(|error| failed(format!("no thread for it can be started: {error}")))?;
        let environment = thread.join().unwrap_or_else(|_| Err(failed("compiling it failed".into())))?;
        Ok(Self { environment: Arc::new(environment), tokens, path: path.to_path_buf(), marks })
    }

    /// Writes the first `count` turns, and the start of an answer if `answer` is set.
    fn render(&self, turns: &Turns, count: usize, answer: bool) -> Result<String, String> {
        let name = if turns.tools && self.environment.get_template(WITH_TOOLS).is_ok() { WITH_TOOLS } else { PLAIN };
        let variables = self.tokens.iter().map(|(key, text)| (key.to_string(), Jinja::from(text.as_str())));
        let nothing = ["tools", "documents"].map(|key| (key.to_string(), Jinja::from(())));
        let own = [
            ("messages".to_string(), turns.messages[..count].iter().cloned().collect()),
            ("add_generation_prompt".to_string(), Jinja::from(answer)),
        ];
        let all = nothing.into_iter().chain(own).chain(variables).chain(turns.variables.clone());
        let context = Jinja::from_pairs(all);
        let (environment, (sender, result)) = (Arc::clone(&self.environment), mpsc::channel());
        let render = move || {
            let text = environment.get_template(name).and_then(|template| template.render(&context));
            // Nobody waits for one that took too long.
            let _ = sender.send(text.map_err(|error| format!("refuses: {error:#}")));
        };
        let started = std::thread::Builder::new().stack_size(STACK).spawn(render);
        started.map_err(|error| format!("no thread for the chat template can be started: {error}"))?;
        let text = result.recv_timeout(TIME).unwrap_or_else(|error| {
            Err(match error {
                RecvTimeoutError::Timeout => {
                    format!("takes more than {} s for one conversation; use another", TIME.as_secs())
                }
                RecvTimeoutError::Disconnected => "failed; use another".into(),
            })
        });
        text.map_err(|problem| format!("the chat template in {} {problem}", self.path.display()))
    }

    /// Text of a prompt: the turns and the start of an answer.
    pub fn prompt(&self, conversation: &Conversation) -> Result<String, String> {
        let turns = Turns::of(conversation);
        Ok(parted(self.render(&turns, turns.messages.len(), true)?).0)
    }

    /// Writes a conversation and locates its trained turns.
    ///
    /// If the template marks them, the marks are used; otherwise the text written up to each turn must be a prefix of
    /// the whole.
    pub(super) fn write(&self, conversation: &Conversation) -> Result<Written, String> {
        let turns = Turns::of(conversation);
        let (text, marked) = parted(self.render(&turns, turns.messages.len(), false)?);
        let render = |count: usize, answer: bool| Ok::<_, String>(parted(self.render(&turns, count, answer)?).0);
        let other_way = |turn: usize| {
            format!(
                "the chat template writes turn {} in another way when more follow; give `prompt` and `completion`",
                turn + 1
            )
        };
        let counts = &conversation.counts;
        if let Some(first) = conversation.prompt
            && counts[first..].iter().all(|counts| *counts)
        {
            let before = render(first, true)?;
            return match text.starts_with(&before) {
                true => Ok(Written { answers: std::iter::once(before.len()..text.len()).collect(), text }),
                false => Err("the chat template writes the prompt in another way when the completion follows; give them as texts".into()),
            };
        }
        if self.marks && conversation.prompt.is_none() {
            let own: Vec<bool> = conversation
                .messages
                .iter()
                .zip(counts)
                .filter(|(message, _)| is_assistant(message))
                .map(|(_, counts)| *counts)
                .collect();
            let answers = match own.iter().all(|counts| *counts) {
                true => marked,
                false if own.len() == marked.len() => {
                    marked.into_iter().zip(own).filter(|(_, counts)| *counts).map(|(range, _)| range).collect()
                }
                false => {
                    return Err(format!(
                        "turns of the assistant that do not count cannot be told apart: the chat template marks {} parts of {} such turns; give `prompt` and `completion`",
                        marked.len(),
                        own.len()
                    ));
                }
            };
            return Ok(Written { text, answers });
        }
        let mut answers = Vec::new();
        for (turn, message) in conversation.messages.iter().enumerate().filter(|(turn, _)| counts[*turn]) {
            let (before, after) = (render(turn, is_assistant(message))?, render(turn + 1, false)?);
            if !after.starts_with(&before) || !text.starts_with(&after) {
                return Err(other_way(turn));
            }
            answers.push(before.len()..after.len());
        }
        Ok(Written { text, answers })
    }
}

/// Conversation as template values.
struct Turns {
    messages: Vec<Jinja>,
    variables: Vec<(String, Jinja)>,
    tools: bool,
}

impl Turns {
    fn of(conversation: &Conversation) -> Self {
        Self {
            messages: conversation.messages.iter().map(with_reasoning).collect(),
            variables: conversation.variables.iter().map(|(key, value)| (key.clone(), jinja(value))).collect(),
            tools: conversation.variables.iter().any(|(key, _)| key == "tools"),
        }
    }
}

/// Turn whose reasoning is available under the names that templates read, as in `transformers`.
fn with_reasoning(message: &Json) -> Jinja {
    let known = |key: &&str| message.get(key).is_some_and(|value| *value != Json::Null);
    let Some(key) = ["reasoning_content", "thinking", "reasoning"].into_iter().find(known) else {
        return jinja(message);
    };
    let (Json::Object(entries), Some(reasoning)) = (message, message.get(key)) else { return jinja(message) };
    let mut entries = entries.clone();
    let put = |entries: &mut Vec<(String, Json)>, key: &str, over: bool| match entries
        .iter_mut()
        .find(|(known, _)| known == key)
    {
        Some((_, value)) if over => *value = reasoning.clone(),
        Some(_) => {}
        None => entries.push((key.to_string(), reasoning.clone())),
    };
    put(&mut entries, "thinking", false);
    put(&mut entries, "reasoning_content", true);
    jinja(&Json::Object(entries))
}

fn jinja(json: &Json) -> Jinja {
    match json {
        Json::Null => Jinja::from(()),
        Json::Bool(flag) => Jinja::from(*flag),
        Json::Number(number) => match (number.as_i64(), number.as_u64()) {
            (Some(number), _) => Jinja::from(number),
            (None, Some(number)) => Jinja::from(number),
            (None, None) => Jinja::from(number.as_f64().unwrap_or(f64::NAN)),
        },
        Json::Text(text) => Jinja::from(text.as_str()),
        Json::List(items) => items.iter().map(jinja).collect(),
        Json::Object(entries) => Jinja::from_pairs(entries.iter().map(|(key, value)| (key.as_str(), jinja(value)))),
    }
}

/// Function behind `{% generation %}`: encloses the text of the block in marks.
fn marked(state: &mut State, options: Kwargs) -> Result<String, Error> {
    let caller: Jinja = options.get("caller")?;
    let text = caller.call(state, &[])?;
    Ok(format!("{}{text}{}", MARKS[0], MARKS[1]))
}

/// Removes the marks from a text and returns the ranges that they enclosed.
fn parted(text: String) -> (String, Vec<Range<usize>>) {
    if !text.contains(MARKS) {
        return (text, Vec::new());
    }
    let (mut plain, mut ranges, mut begin) = (String::with_capacity(text.len()), Vec::new(), None);
    for c in text.chars() {
        match (c, begin) {
            (c, None) if c == MARKS[0] => begin = Some(plain.len()),
            (c, Some(from)) if c == MARKS[1] => {
                ranges.push(from..plain.len());
                begin = None;
            }
            _ if MARKS.contains(&c) => {}
            _ => plain.push(c),
        }
    }
    (plain, ranges)
}

#[cfg(test)]
mod tests;
