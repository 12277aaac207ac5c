//! Chat templates: how a model wants a conversation written.

use std::ops::Range;
use std::path::Path;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::Serde;
use minijinja::{Environment, Error, ErrorKind, Value as Jinja, context};
use serde_json::Value;

use super::DataError;

/// The template of a model folder: `chat_template.jinja`, or `chat_template` of `tokenizer_config.json`.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    begin: Option<String>,
    end: Option<String>,
}

/// A conversation as the template writes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Written {
    pub text: String,
    /// Bytes that the assistant's turns take, with what ends them.
    pub answers: Vec<Range<usize>>,
}

const FILE: &str = "chat_template.jinja";
const CONFIG: &str = "tokenizer_config.json";

impl ChatTemplate {
    /// Reads the template of a folder; none when the folder has none.
    pub fn read(dir: &Path) -> Result<Option<Self>, DataError> {
        let (path, config) = (dir.join(FILE), dir.join(CONFIG));
        let read = |path: &Path| match path.exists() {
            true => std::fs::read_to_string(path).map(Some).map_err(DataError::read(path)),
            false => Ok(None),
        };
        let bad = |path: &Path, problem: String| DataError::Template { path: path.to_path_buf(), problem };
        let settings: Value = match read(&config)? {
            Some(text) => serde_json::from_str(&text).map_err(|error| bad(&config, format!("not JSON: {error}")))?,
            None => Value::Null,
        };
        let (from, source) = match (read(&path)?, &settings["chat_template"]) {
            (Some(source), _) => (&path, source),
            (None, Value::String(source)) => (&config, source.clone()),
            // Several by name.
            (None, Value::Array(named)) => match named.iter().find(|one| one["name"] == "default") {
                Some(Value::Object(one)) if one["template"].is_string() => {
                    (&config, one["template"].as_str().unwrap_or_default().to_string())
                }
                _ => return Err(bad(&config, "has several chat templates, but none named \"default\"".into())),
            },
            _ => return Ok(None),
        };
        let token = |key: &str| {
            let token = &settings[key];
            token.as_str().or(token["content"].as_str()).map(str::to_string)
        };
        Self::new(source, token("bos_token"), token("eos_token"))
            .map(Some)
            .map_err(|error| bad(from, format!("the chat template cannot be read: {error:#}")))
    }

    fn new(source: String, begin: Option<String>, end: Option<String>) -> Result<Self, Error> {
        let mut environment = Environment::new();
        // As `transformers` sets up Jinja.
        environment.set_syntax(SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?);
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function("raise_exception", |message: String| -> Result<Jinja, Error> {
            Err(Error::new(ErrorKind::InvalidOperation, message))
        });
        environment.add_template_owned("chat", source)?;
        Ok(Self { environment, begin, end })
    }

    /// Writes messages, with the beginning of an answer when `answer`.
    fn render(&self, messages: &[Value], answer: bool) -> Result<String, Error> {
        let template = self.environment.get_template("chat")?;
        let (bos_token, eos_token) = (self.begin.as_deref().unwrap_or(""), self.end.as_deref().unwrap_or(""));
        let messages = Jinja::from(Serde(messages));
        template.render(context! { messages, add_generation_prompt => answer, bos_token, eos_token })
    }

    /// Writes a conversation and finds the assistant's turns in it: what is written up to each of them must be how the whole begins.
    pub(super) fn write(&self, messages: &[Value]) -> Result<Written, String> {
        let render = |count: usize, answer: bool| {
            self.render(&messages[..count], answer).map_err(|error| format!("the chat template refuses: {error}"))
        };
        let text = render(messages.len(), false)?;
        let mut answers = Vec::new();
        for (turn, message) in messages.iter().enumerate() {
            if message["role"] != "assistant" {
                continue;
            }
            let (before, after) = (render(turn, true)?, render(turn + 1, false)?);
            if !after.starts_with(&before) || !text.starts_with(&after) {
                return Err(format!(
                    "the chat template writes turn {} in another way when more follow; give `prompt` and `completion`",
                    turn + 1
                ));
            }
            answers.push(before.len()..after.len());
        }
        Ok(Written { text, answers })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    const CHATML: &str = "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nBe kind<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

    fn conversation() -> Vec<Value> {
        let turn = |role: &str, content: &str| json!({"role": role, "content": content});
        vec![turn("user", "1 + 1?"), turn("assistant", "2"), turn("user", "Sure?"), turn("assistant", "Yes.")]
    }

    fn template(source: &str) -> ChatTemplate {
        ChatTemplate::new(source.into(), Some("<s>".into()), Some("</s>".into())).unwrap()
    }

    #[test]
    fn the_turns_of_the_assistant_are_found() {
        let written = template(CHATML).write(&conversation()).unwrap();
        let answers: Vec<&str> = written.answers.iter().map(|range| &written.text[range.clone()]).collect();
        assert_eq!(answers, ["2<|im_end|>\n", "Yes.<|im_end|>\n"]);
        assert!(written.text.starts_with("<|im_start|>system\nBe kind<|im_end|>\n<|im_start|>user\n1 + 1?<|im_end|>"));
    }

    #[test]
    fn methods_of_python_and_blocks_on_lines_of_their_own_work() {
        let source = "{{ bos_token }}\n{% for m in messages %}\n  {% if m.role == 'user' %}\n[INST] {{ m.content.strip() }} [/INST]{% else %}\n{{ m.content }}{{ eos_token }}{% endif %}\n{% endfor %}\n";
        let written = template(source).write(&conversation()).unwrap();
        assert_eq!(written.text, "<s>\n[INST] 1 + 1? [/INST]2</s>[INST] Sure? [/INST]Yes.</s>");
        assert_eq!(&written.text[written.answers[1].clone()], "Yes.</s>");
    }

    #[test]
    fn what_cannot_be_written_says_why() {
        let raising = template("{{ raise_exception('roles must alternate') }}");
        assert!(raising.write(&conversation()).unwrap_err().contains("roles must alternate"));
        let last = template("{% for m in messages %}{% if loop.last %}{{ m.content }}{% endif %}{% endfor %}");
        assert!(last.write(&conversation()).unwrap_err().contains("turn 2"));
        let dir = tempfile::tempdir().unwrap();
        assert!(ChatTemplate::read(dir.path()).unwrap().is_none());
        std::fs::write(dir.path().join(CONFIG), json!({"chat_template": "{% if"}).to_string()).unwrap();
        let message = ChatTemplate::read(dir.path()).unwrap_err().to_string();
        assert!(message.contains(CONFIG) && message.contains("chat template"), "{message}");
        let named = json!({"chat_template": [{"name": "default", "template": "{{ eos_token }}"}], "eos_token": {"content": "</s>"}});
        std::fs::write(dir.path().join(CONFIG), named.to_string()).unwrap();
        assert_eq!(ChatTemplate::read(dir.path()).unwrap().unwrap().write(&[]).unwrap().text, "</s>");
        std::fs::write(dir.path().join(FILE), "from its own file").unwrap();
        assert_eq!(ChatTemplate::read(dir.path()).unwrap().unwrap().write(&[]).unwrap().text, "from its own file");
    }
}
