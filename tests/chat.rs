//! Conversations with a model through pipes.

#[path = "program.rs"]
mod program;

use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Child, Command, Stdio};

use program::{Workshop, refused, stderr};

/// A template that shows every message with its role, and what an answer begins with.
const TEMPLATE: &str = "{% for m in messages %}[{{ m.role }}]{{ m.content }};{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}";

fn talking(shop: &Workshop, more: &[&str]) -> Child {
    let args = [&["chat", "--model", "model", "--greedy"], more].concat();
    let mut command = shop.command(&args);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command.spawn().expect("the program starts")
}

/// Answers to some messages.
fn answers(shop: &Workshop, more: &[&str], messages: &str) -> String {
    let mut child = talking(shop, more);
    child.stdin.take().expect("a pipe").write_all(messages.as_bytes()).expect("it is read");
    let output = child.wait_with_output().expect("it ends");
    assert!(output.status.success(), "{}", stderr(&output));
    String::from_utf8(output.stdout).expect("text")
}

fn with_template() -> Workshop {
    let shop = Workshop::with_model(0);
    std::fs::write(shop.path("model/chat_template.jinja"), TEMPLATE).expect("a file");
    shop
}

#[test]
fn an_answer_continues_the_whole_conversation_in_the_form_of_the_template() {
    let shop = with_template();
    // Six tokens are six bytes: none of the answers ends a line by itself.
    let two = answers(&shop, &["--tokens", "6", "--system", "be brief"], "the model\n\n  a small rank  \n");
    let first = answers(&shop, &["--tokens", "6", "--system", "be brief"], "the model\n");
    let second = two.strip_prefix(&first).expect("the first answer does not depend on the second message");
    let continued = |prompt: &str| {
        let output = shop.run(&["generate", "--model", "model", "--greedy", "--tokens", "6", "--prompt", prompt]);
        String::from_utf8(program::succeeded(output).stdout).expect("text")
    };
    let begin = "[system]be brief;[user]the model;[assistant]";
    assert!(continued(begin).trim_end().ends_with(first.trim_end()), "{first:?} in {:?}", continued(begin));
    let longer = format!("{begin}{};[user]a small rank;[assistant]", first.trim_end_matches('\n'));
    assert!(continued(&longer).trim_end().ends_with(second.trim_end()), "{second:?} in {:?}", continued(&longer));
    assert_ne!(first, answers(&shop, &["--tokens", "6"], "rows of\n"), "the message matters");
}

#[cfg(unix)]
#[test]
fn an_interrupt_stops_the_answer_and_not_the_program() {
    let shop = with_template();
    let mut child = talking(&shop, &["--tokens", "60"]);
    let mut input = child.stdin.take().expect("a pipe");
    let mut output = BufReader::new(child.stdout.take().expect("a pipe"));
    input.write_all(b"the model\n").expect("it is read");
    let mut first = [0];
    output.read_exact(&mut first).expect("an answer begins");
    let sent = Command::new("kill").args(["-INT", &child.id().to_string()]).status().expect("kill runs");
    assert!(sent.success());
    let mut line = String::new();
    output.read_line(&mut line).expect("the answer ends");
    input.write_all(b"a small rank\n").expect("it is read");
    drop(input);
    let mut rest = String::new();
    output.read_to_string(&mut rest).expect("another answer");
    assert!(!rest.trim().is_empty(), "the second message is answered");
    assert!(child.wait().expect("it ends").success());
}

#[test]
fn a_conversation_without_a_form_or_without_room_is_refused() {
    let shop = Workshop::with_model(0);
    refused(&shop.run(&["chat", "--model", "model"]), &["no chat template", "lowrank generate --prompt"]);
    std::fs::write(shop.path("model/chat_template.jinja"), TEMPLATE).expect("a file");
    let mut child = talking(&shop, &[]);
    let long = format!("{}\n", "word ".repeat(40));
    child.stdin.take().expect("a pipe").write_all(long.as_bytes()).expect("it is read");
    refused(&child.wait_with_output().expect("it ends"), &["128 positions", "start a new one"]);
}
