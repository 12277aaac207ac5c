use super::*;
use crate::data::{ChatTemplate, DataError, Format, HeldOut, IGNORE, Source, Tokenizer};

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
            held_out: &HeldOut::Fraction(0.2),
            tokenizer: &self.tokenizer,
            template: Some(&self.template),
            end: 256,
            vocab_size: 257,
            learn_prompt: false,
            seq_len: 64,
            length_key: "train.seq_len",
            too_long: TooLong::Truncate,
            seed: 1,
            cache: self.dir.path(),
            fields: &[],
        };
        change(&mut options);
        Examples::read(&options)
    }

    /// Example of the first line, on either side.
    fn first(&self, line: &str, change: impl FnOnce(&mut ExampleOptions)) -> Example {
        let examples = self.read(&[line, r#"{"text": "another"}"#], change).unwrap();
        let other = "another".len() + 1;
        let mut all = examples.train.iter().chain(examples.validation.iter());
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
fn the_targets_follow_the_inputs_and_long_examples_are_cut_and_counted() {
    let bench = Bench::new();
    let lines = [r#"{"prompt": "abc", "completion": "defghijkl"}"#, r#"{"text": "short"}"#];
    let examples = bench.read(&lines, |options| options.seq_len = 6).unwrap();
    assert_eq!(examples.truncated, 1);
    for example in examples.train.iter().chain(examples.validation.iter()) {
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
    let known: Vec<Example> = all.validation.iter().collect();
    assert!(fewer.validation.iter().all(|example| known.contains(&example)));
    assert_eq!(all.fingerprint(), bench.read(&lines, |_| ()).unwrap().fingerprint());
    assert_ne!(all.fingerprint(), fewer.fingerprint());
}

#[test]
fn long_examples_are_cut_left_out_or_refused() {
    let bench = Bench::new();
    let long = format!(r#"{{"prompt": "{}", "completion": "bcdefghijkl"}}"#, "a".repeat(3));
    let lines = [long.as_str(), r#"{"text": "short"}"#, r#"{"text": "other"}"#];
    let read = |too_long: TooLong| bench.read(&lines, |options| (options.seq_len, options.too_long) = (8, too_long));
    let counts =
        |examples: Examples| (examples.train.len() + examples.validation.len(), examples.truncated, examples.dropped);
    assert_eq!(counts(read(TooLong::Truncate).unwrap()), (3, 1, 0));
    assert_eq!(counts(read(TooLong::Drop).unwrap()), (2, 0, 1));
    let message = read(TooLong::Error).unwrap_err().to_string();
    assert!(message.contains("train.jsonl line 1") && message.contains("data.too_long"), "{message}");
    // One whose answer lies beyond what is encoded at all.
    let question = "word ".repeat(250_000);
    let talk = format!(
        r#"{{"messages": [{{"role": "user", "content": "{question}"}}, {{"role": "assistant", "content": "yes"}}]}}"#
    );
    let lines_of_talk = [talk.as_str(), lines[1], lines[2]];
    let read =
        |too_long: TooLong| bench.read(&lines_of_talk, |options| (options.seq_len, options.too_long) = (8, too_long));
    assert_eq!(counts(read(TooLong::Drop).unwrap()), (2, 0, 1));
    for (too_long, part) in [(TooLong::Error, "more than 9 tokens"), (TooLong::Truncate, "its prompt alone")] {
        let message = read(too_long).unwrap_err().to_string();
        assert!(message.contains("line 1") && message.contains(part), "{message}");
    }
    let all = bench.read(&lines[..1], |options| (options.seq_len, options.too_long) = (8, TooLong::Drop));
    assert!(all.unwrap_err().to_string().contains("all 1 examples are longer"));
}

#[test]
fn other_data_or_all_of_it_may_be_held_out() {
    let bench = Bench::new();
    let path = bench.dir.path().join("other.jsonl");
    std::fs::write(&path, r#"[{"text": "measured"}, {"prompt": "a", "completion": "b"}]"#).unwrap();
    let other: &'static HeldOut =
        Box::leak(Box::new(HeldOut::Source(Source { paths: vec![path], format: Format::Auto, field: "text".into() })));
    let lines = [r#"{"text": "one"}"#, r#"{"text": "one"}"#];
    let count = |examples: Examples| (examples.train.len(), examples.validation.len());
    assert_eq!(count(bench.read(&lines, |options| options.held_out = other).unwrap()), (2, 2));
    assert_eq!(count(bench.read(&lines, |options| options.held_out = &HeldOut::Everything).unwrap()), (0, 2));
}

#[test]
fn a_token_without_an_embedding_is_refused() {
    let bench = Bench::new();
    let lines = [r#"{"text": "a<|endoftext|>b"}"#, r#"{"text": "other"}"#];
    assert!(bench.read(&lines, |_| ()).is_ok());
    let message = bench.read(&lines, |options| options.vocab_size = 256).unwrap_err().to_string();
    assert!(message.contains("line 1") && message.contains("token 256 (\"<|endoftext|>\")"), "{message}");
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
