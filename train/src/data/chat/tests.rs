use super::*;

const CHATML: &str = "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nBe kind<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

fn of(line: &str) -> Result<Conversation, String> {
    let line: Json = serde_json::from_str(line).unwrap();
    match line.get("messages") {
        Some(messages) => Conversation::of_messages(messages, &line),
        None => Conversation::of_pair(line.get("prompt").unwrap(), line.get("completion").unwrap(), &line),
    }
}

const LINE: &str = r#"{"messages": [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"},
    {"role": "user", "content": "Sure?"}, {"role": "assistant", "content": "Yes."}]}"#;

fn conversation() -> Conversation {
    of(LINE).unwrap()
}

fn template(source: &str) -> ChatTemplate {
    let tokens = [("bos_token", "<s>"), ("eos_token", "</s>")].map(|(key, text)| (key.to_string(), text.to_string()));
    ChatTemplate::new(vec![(PLAIN, source.into())], tokens.to_vec(), Path::new("folder/chat_template.jinja")).unwrap()
}

fn answers(written: &Written) -> Vec<&str> {
    written.answers.iter().map(|range| &written.text[range.clone()]).collect()
}

#[test]
fn the_turns_of_the_assistant_are_found() {
    let written = template(CHATML).write(&conversation()).unwrap();
    assert_eq!(answers(&written), ["2<|im_end|>\n", "Yes.<|im_end|>\n"]);
    assert!(written.text.starts_with("<|im_start|>system\nBe kind<|im_end|>\n<|im_start|>user\n1 + 1?<|im_end|>"));
}

#[test]
fn what_templates_call_gives_what_jinja_and_python_give() {
    let written = |source: &str| template(source).prompt(&conversation_of_two()).unwrap();
    for (source, expected) in [
        ("{% for m in messages %}{{ loop.previtem.role if loop.previtem is defined else '-' }}{% endfor %}", "-system"),
        ("{% for m in messages %}{{ loop.nextitem is defined }}{% endfor %}", "TrueFalse"),
        ("{{ 'a\nb\n\nc\n' | indent(2) }}|{{ 'a\nb' | indent(1, first=true) }}", "a\n  b\n\n  c\n| a\n b"),
        ("{{ 'a\nb' | indent(1, true) }}|{{ 'a\n\nb' | indent(2, false, true) }}", " a\n b|a\n  \n  b"),
        ("a\r\n{{ 'b\r\nc' }}\rd", "a\nb\nc\nd"),
        ("{{ \"it's <so>\".title() }}", "It'S <So>"),
        ("{{ 'a-b-c'.rsplit('-', 1) }}{{ 'a-b'.rsplit('-') }}", "['a-b', 'c']['a', 'b']"),
        ("{{ '\\U0001f600\\x41\\a\\/\\d' }}{{ \"\\U00000022\\u00e9\" }}", "😀A\u{7}\\/\\d\"é"),
        (
            "{% macro f(a, b=a, c=b ~ '-' ~ d, d='x, =') %}{{ a }}{{ b }}{{ c }}{{ d }}{% endmacro %}{{ f(1) }} {{ f(1, 2) }} {{ f(1, c=3) }}",
            "111-x, = 122-x, = 113x, =",
        ),
        (
            "{%- macro g(a, b=a.x, c=[a, {'k': a}]) -%}\n  {{ b }}{{ c }}\n{%- endmacro -%}\n{{ g({'x': 1}) }}",
            "1[{'x': 1}, {'k': {'x': 1}}]",
        ),
        ("{% set a = 7 %}{% macro f(b=a, a=2) %}\n{{ b }}{{ a }}\n{% endmacro %}{{ f() }}|{{ f(a=3) }}", "2\n|33\n"),
        (
            "{% macro f(a=1, b=a, c=3) %}{{ a }}{{ b }}{{ c }}{% endmacro %}{{ f() }}{{ f(5) }}{{ f(none) }}{{ f(b=none) }}",
            "113553NoneNone31None3",
        ),
        (
            "{% raw %}{{ '\\U0001f600' }}{% generation %}{% endraw %}{# {% generation %} #}|",
            "{{ '\\U0001f600' }}{% generation %}|",
        ),
        ("{{ '{% generation %}' }}{{ {'a': {'b': 1}}['a']['b'] }}{{ {'a': {}}}}", "{% generation %}1{'a': {}}"),
        ("{{ 'a=b=c'.partition('=')[2] }}{{ 'xay'.removeprefix('x').removesuffix('y') }}", "b=ca"),
    ] {
        assert_eq!(written(source), expected, "{source}");
    }
}

fn conversation_of_two() -> Conversation {
    Conversation::asking(Some("s"), "u")
}

#[test]
fn turns_that_do_not_count_are_left_out() {
    for said in [r#""weight": 0"#, r#""weight": 0.0"#, r#""train": false"#, r#""training": false"#] {
        let line = LINE.replacen(r#""content": "2""#, &format!(r#""content": "2", {said}"#), 1);
        assert_eq!(answers(&template(CHATML).write(&of(&line).unwrap()).unwrap()), ["Yes.<|im_end|>\n"], "{said}");
    }
    let line = LINE.replacen(r#""content": "2""#, r#""content": "2", "loss": false"#, 1);
    assert_eq!(answers(&template(CHATML).write(&of(&line).unwrap()).unwrap()), ["Yes.<|im_end|>\n"]);
    for (said, refused) in
        [(r#""weight": 0"#, true), (r#""train": false"#, true), (r#""weight": 1"#, false), (r#""train": "x""#, false)]
    {
        let line: Json = serde_json::from_str(&LINE.replacen('{', &format!("{{{said}, "), 1)).unwrap();
        assert_eq!(refuse_weight(&line).is_err(), refused, "{said}");
    }
    for (said, part) in [(r#""weight": 0.5"#, "weight"), (r#""train": "no""#, "train")] {
        let line = LINE.replacen(r#""content": "2""#, &format!(r#""content": "2", {said}"#), 1);
        let refusal = of(&line).unwrap_err();
        assert!(refusal.contains(part) && refusal.contains("turn 2"), "{refusal}");
    }
    let line = LINE.replacen(r#""content": "1 + 1?""#, r#""content": "1 + 1?", "train": true"#, 1);
    assert!(of(&line).unwrap_err().contains("not the assistant's"));
}

#[test]
fn blocks_of_generation_mark_what_counts() {
    let source = "{% for m in messages %}{% if m.role == 'assistant' %}{{ 'a:' }}\n  {%- generation -%}\n  {{ m.content + eos_token }}\n  {%- endgeneration -%}\n{% else %}{{ 'u:' + m.content }}{% endif %}{% endfor %}";
    let written = template(source).write(&conversation()).unwrap();
    assert_eq!(written.text, "u:1 + 1?a:2</s>u:Sure?a:Yes.</s>");
    assert_eq!(answers(&written), ["2</s>", "Yes.</s>"]);
    let line = LINE.replacen(r#""content": "2""#, r#""content": "2", "weight": 0"#, 1);
    assert_eq!(answers(&template(source).write(&of(&line).unwrap()).unwrap()), ["Yes.</s>"]);
    // A prompt needs no marks.
    assert_eq!(template(source).prompt(&Conversation::asking(None, "x")).unwrap(), "u:x");
}

#[test]
fn turns_in_prompt_and_completion_are_one_conversation() {
    let line = r#"{"prompt": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}],
        "completion": [{"role": "assistant", "content": "d"}]}"#;
    let written = template(CHATML).write(&of(line).unwrap()).unwrap();
    assert_eq!(answers(&written), ["d<|im_end|>\n"]);
    assert!(
        of(r#"{"prompt": [{"role": "user", "content": "a"}], "completion": "b"}"#).unwrap_err().contains("completion")
    );
}

#[test]
fn messages_are_handed_on_as_they_are() {
    let source = "{{ tools | tojson if tools else 'none' }}{{ reasoning is defined }}{% for m in messages %}{% if m.content is string %}{{ m.content }}{% elif m.content %}{% for part in m.content %}{{ part.text }}{% endfor %}{% else %}{{ m.content }}{% endif %}{% for call in m.tool_calls or [] %}{{ call.function | tojson }}{% endfor %}|{% endfor %}";
    let line = r#"{"messages": [{"role": "user", "content": [{"type": "text", "text": "parts"}]},
        {"role": "assistant", "content": null, "tool_calls": [{"function": {"name": "f", "arguments": {"z": 1, "a": "<&'>"}}}]},
        {"role": "assistant", "tool_calls": []}], "tools": [{"name": "f", "b": 1, "a": 2.0}], "chat_template_kwargs": {"reasoning": true}}"#;
    let written = template(source).write(&of(line).unwrap());
    assert_eq!(
        written.unwrap().text,
        r#"[{"name": "f", "b": 1, "a": 2.0}]Trueparts|None{"name": "f", "arguments": {"z": 1, "a": "<&'>"}}||"#
    );
    for (message, part) in [
        (r#"{"role": "user"}"#, "no \"content\""),
        (r#"{"role": "user", "content": 3}"#, "is 3"),
        (r#"{"content": "x"}"#, "role"),
    ] {
        assert!(of(&format!(r#"{{"messages": [{message}]}}"#)).unwrap_err().contains(part), "{message}");
    }
}

/// Values as `json.dumps` and `str` of Python 3.11 write them.
#[test]
fn values_are_written_as_python_writes_them() {
    let line = r#"{"messages": [], "chat_template_kwargs": {"v": {"text": "a<b & 'c' \"d\" ü\n", "n": [1, 2.5, 1e20, true, null], "e": {}, "l": []}}}"#;
    let line: Json = serde_json::from_str(line).unwrap();
    let turn = Json::List(vec![serde_json::from_str(r#"{"role": "user", "content": ""}"#).unwrap()]);
    let conversation = Conversation::of_messages(&turn, &line).unwrap();
    for (expression, expected) in [
        ("v | tojson", r#"{"text": "a<b & 'c' \"d\" ü\n", "n": [1, 2.5, 1e+20, true, null], "e": {}, "l": []}"#),
        ("v.text | tojson(ensure_ascii=true)", r#""a<b & 'c' \"d\" \u00fc\n""#),
        ("v.n | tojson(indent=2)", "[\n  1,\n  2.5,\n  1e+20,\n  true,\n  null\n]"),
        (
            "v | tojson(separators=(',', ':'), sort_keys=true)",
            r#"{"e":{},"l":[],"n":[1,2.5,1e+20,true,null],"text":"a<b & 'c' \"d\" ü\n"}"#,
        ),
        ("v.n", "[1, 2.5, 1e+20, True, None]"),
        ("v.e", "{}"),
        ("{'b': 1, 'a': 'x'}", "{'b': 1, 'a': 'x'}"),
        ("v.missing", ""),
        ("none", "None"),
        ("1e20", "1e+20"),
    ] {
        let written = template(&format!("{{{{ {expression} }}}}")).write(&conversation).unwrap();
        assert_eq!(written.text, expected, "{expression}");
    }
}

#[test]
fn methods_of_python_and_blocks_on_lines_of_their_own_work() {
    let source = "{{ bos_token }}\n{% for m in messages %}\n  {% if m.role == 'user' %}\n[INST] {{ m.content.strip() }} [/INST]{% else %}\n{{ m.content }}{{ eos_token }}{% endif %}\n{% endfor %}\n";
    let written = template(source).write(&conversation()).unwrap();
    assert_eq!(written.text, "<s>\n[INST] 1 + 1? [/INST]2</s>[INST] Sure? [/INST]Yes.</s>");
    assert_eq!(answers(&written)[1], "Yes.</s>");
}

/// A template may have any origin: whatever it contains, it ends, in little memory.
#[test]
fn templates_that_would_never_end_are_stopped() {
    let deep = |open: &str, close: &str| open.repeat(20_000) + "1" + &close.repeat(20_000);
    for source in [
        "{% for a in range(100000) %}{% for b in range(100000) %}{{ b }}{% endfor %}{% endfor %}".to_string(),
        "{% set n = namespace(x='aaaaaaaa') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}"
            .into(),
        "{{ 'x' * 100000000000 }}".into(),
        "{{ 'x' * 4000000000 }}".into(),
        "{% macro m(n) %}{{ m(n + 1) }}{% endmacro %}{{ m(0) }}".into(),
        format!("{{{{ {} }}}}", deep("(", ")")),
        format!("{{{{ {} }}}}", deep("[", "]")),
        format!("{{{{ {} }}}}", "not ".repeat(20_000) + "1"),
        format!("{{{{ {} }}}}", "-".repeat(20_000) + "1"),
        format!("{{{{ {}1 }}}}", "1 + ".repeat(20_000)),
        deep("{% if true %}", "{% endif %}"),
        deep("{% for x in [1] %}", "{% endfor %}"),
        "x".repeat(MOST_BYTES + 1),
    ] {
        let tokens = Vec::new();
        if let Ok(template) = ChatTemplate::new(vec![(PLAIN, source.clone())], tokens, Path::new("")) {
            let written = template.write(&conversation());
            assert!(written.is_err() || written.unwrap().text.len() < 1 << 24, "{}", &source[..40.min(source.len())]);
        }
    }
}

#[test]
fn what_cannot_be_written_says_why() {
    let raising = template("{{ raise_exception('roles must alternate') }}");
    let refusal = raising.write(&conversation()).unwrap_err();
    assert!(refusal.contains("roles must alternate") && refusal.contains("folder/chat_template.jinja"), "{refusal}");
    for (escape, problem) in
        [("\\U110000", "no character"), ("\\U00110000", "no character"), ("\\N{BULLET}", "by name")]
    {
        let source = vec![(PLAIN, format!("{{{{ '{escape}' }}}}"))];
        let refusal = format!("{:#}", ChatTemplate::new(source, Vec::new(), Path::new("")).unwrap_err());
        assert!(refusal.contains(problem), "{refusal}");
    }
    let last = template("{% for m in messages %}{% if loop.last %}{{ m.content }}{% endif %}{% endfor %}");
    assert!(last.write(&conversation()).unwrap_err().contains("turn 2"));
    let dir = tempfile::tempdir().unwrap();
    let read = || ChatTemplate::read(dir.path());
    assert!(read().unwrap().is_none());
    let write = |settings: Value| std::fs::write(dir.path().join(TOKENIZER_CONFIG), settings.to_string()).unwrap();
    // Blocks that are cut off, or whose signs overlap.
    for cut in ["{% if", "{%}", "{%}{% generation %}", "{%%", "{%-%}"] {
        write(serde_json::json!({"chat_template": cut}));
        let message = read().unwrap_err().to_string();
        assert!(message.contains(TOKENIZER_CONFIG) && message.contains("chat template"), "{cut}: {message}");
    }
    let asked = Conversation::asking(None, "x");
    write(serde_json::json!({
        "chat_template": [{"name": "default", "template": "{{ eos_token }}"}, {"name": "tool_use", "template": "tools"}],
        "eos_token": {"content": "</s>"},
    }));
    assert_eq!(read().unwrap().unwrap().prompt(&asked).unwrap(), "</s>");
    let line = serde_json::from_str(r#"{"tools": [{}]}"#).unwrap();
    let turn = serde_json::from_str(r#"[{"role": "user", "content": ""}]"#).unwrap();
    let with_tools = Conversation::of_messages(&turn, &line).unwrap();
    assert_eq!(read().unwrap().unwrap().prompt(&with_tools).unwrap(), "tools");
    std::fs::write(dir.path().join(CHAT_TEMPLATE), "from its own file").unwrap();
    assert_eq!(read().unwrap().unwrap().prompt(&asked).unwrap(), "from its own file");
}

#[test]
fn values_that_share_their_parts_are_not_written_out_without_end() {
    for end in ["{{ ns.s }}", "{{ ns.s | tojson }}"] {
        let doubled =
            "{% set ns = namespace(s=['x']) %}{% for i in range(60) %}{% set ns.s = [ns.s, ns.s] %}{% endfor %}";
        let refused = template(&format!("{doubled}{end}")).prompt(&conversation()).unwrap_err();
        // By its length, or on a slow machine by its time.
        assert!(refused.contains("too long") || refused.contains("more than 5 s"), "{refused}");
    }
}

/// A model folder with these files.
fn folder(files: &[(&str, &str)]) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for (name, text) in files {
        let path = dir.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    }
    dir
}

#[test]
fn templates_and_tokens_are_found_wherever_folders_have_them() {
    let with_tools = of(&LINE.replacen('{', r#"{"tools": [{"x": 1}], "#, 1)).unwrap();
    let written = |files: &[(&str, &str)], conversation: &Conversation| {
        ChatTemplate::read(folder(files).path()).unwrap().unwrap().prompt(conversation).unwrap()
    };
    let further = [("chat_template.jinja", "plain"), ("additional_chat_templates/tool_use.jinja", "tools")];
    assert_eq!((written(&further, &conversation()), written(&further, &with_tools)), ("plain".into(), "tools".into()));
    assert_eq!(written(&[("additional_chat_templates/default.jinja", "own")], &conversation()), "own");
    let object = r#"{"chat_template": {"default": "a", "tool_use": "b"}}"#;
    assert_eq!(written(&[("tokenizer_config.json", object)], &with_tools), "b");
    let tokens = [
        ("chat_template.jinja", "{{ bos_token }}{{ eos_token }}{{ eot_token }}{{ image_token }}"),
        ("special_tokens_map.json", r#"{"bos_token": "<s>", "eos_token": {"content": "<old>"}}"#),
        (
            "tokenizer_config.json",
            r#"{"eos_token": "</s>", "eot_token": "<eot>", "extra_special_tokens": {"image_token": "<img>"}}"#,
        ),
    ];
    assert_eq!(written(&tokens, &conversation()), "<s></s><eot><img>");
    let nameless = folder(&[("tokenizer_config.json", r#"{"chat_template": [{"name": "rag", "template": "x"}]}"#)]);
    assert!(ChatTemplate::read(nameless.path()).unwrap_err().to_string().contains("default"));
}

#[test]
fn texts_and_dictionaries_are_sequences() {
    let source = "{% for x in ['a', [1], {'k': 1}, 3, none, range(2)] %}{{ x is sequence }} {% endfor %}{{ nothing is sequence }}";
    assert_eq!(template(source).prompt(&conversation()).unwrap(), "True True True False False True False");
}

#[test]
fn values_without_end_are_refused_and_deep_ones_are_dropped() {
    let nested = "{% set ns = namespace(s=[1], t=[1]) %}{% for i in range(300) %}{% for j in range(300) %}\
                  {% set ns.s = [ns.s] %}{% set ns.t = [ns.t] %}{% endfor %}{% endfor %}";
    let deep = template(&format!("{nested}{{{{ ns.s == ns.t }}}}")).prompt(&conversation());
    assert!(deep.as_deref().is_ok_and(|text| text == "True") || deep.is_err(), "{deep:?}");
    let grown = "{% set ns = namespace(s=[1], t=[1]) %}{% for i in range(30) %}\
                 {% set ns.s = [ns.s, ns.s] %}{% set ns.t = [ns.t, ns.t] %}{% endfor %}{{ ns.s == ns.t }}";
    let refusal = template(grown).prompt(&conversation()).unwrap_err();
    assert!(refusal.contains("more than 5 s"), "{refusal}");
}
