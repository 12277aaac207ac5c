use super::*;

const TEXT: &str = "fn main() {\n\tprintln!(\"größe ≥ 日本語 🦀\");\n}\r\n  \u{0}";

fn trained() -> Tokenizer {
    let documents = (0..50).map(|i| Ok(Document { name: i.to_string(), text: format!("{TEXT} number {i}") }));
    Tokenizer::train(documents, 300).unwrap()
}

#[test]
fn bytes_are_their_own_ids() {
    let tokenizer = Tokenizer::bytes().unwrap();
    let ids: Vec<u32> = TEXT.bytes().map(u32::from).collect();
    assert_eq!(tokenizer.encode(TEXT).unwrap(), ids);
    assert_eq!(tokenizer.decode(&ids).unwrap(), TEXT);
    assert_eq!((tokenizer.vocab_size(), tokenizer.separator()), (257, Some(256)));
    assert!(tokenizer.decode(&[0xff, 65]).unwrap().ends_with('A'));
}

#[test]
fn training_is_deterministic_and_lossless() {
    let (a, b) = (trained(), trained());
    assert_eq!(a.fingerprint().unwrap(), b.fingerprint().unwrap());
    assert_eq!(a.vocab_size(), 300);
    let ids = a.encode(TEXT).unwrap();
    assert!(ids.len() < TEXT.len());
    assert_eq!(a.decode(&ids).unwrap(), TEXT);
    assert!(Tokenizer::train(std::iter::empty(), 256).is_err());
}

#[test]
fn files_give_the_same_tokenizer_back() {
    let dir = tempfile::tempdir().unwrap();
    for tokenizer in [Tokenizer::bytes().unwrap(), trained()] {
        tokenizer.save(dir.path()).unwrap();
        let read = Tokenizer::from_file(&dir.path().join("tokenizer.json")).unwrap();
        assert_eq!(read.fingerprint().unwrap(), tokenizer.fingerprint().unwrap());
        assert_eq!(read.encode(TEXT).unwrap(), tokenizer.encode(TEXT).unwrap());
    }
    std::fs::write(dir.path().join("tokenizer.json"), "{").unwrap();
    assert!(Tokenizer::from_file(&dir.path().join("tokenizer.json")).is_err());
}

#[test]
fn the_post_processor_says_what_stands_around_a_text() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("tokenizer.json");
    let bytes = Tokenizer::bytes().unwrap();
    assert_eq!(bytes.encode_whole("ab").unwrap(), [256, 97, 98]);
    let mut json: serde_json::Value = serde_json::from_str(&bytes.json().unwrap()).unwrap();
    json["post_processor"] = serde_json::Value::Null;
    json["added_tokens"][0]["content"] = "[STOP]".into();
    std::fs::write(&path, json.to_string()).unwrap();
    let read = || Tokenizer::from_file(&path).unwrap();
    assert_eq!(read().encode_whole("ab").unwrap(), [97, 98]);
    // Nothing names a token for the start of documents.
    assert!(read().for_documents().unwrap_err().to_string().contains("bos_token"));
    std::fs::write(dir.path().join(TOKENIZER_CONFIG), r#"{"eos_token": {"content": "[STOP]"}}"#).unwrap();
    assert_eq!((read().separator(), read().eos()), (Some(256), Some(256)));
    assert_eq!(read().encode_whole("ab").unwrap(), [97, 98]);
    let documents = read().for_documents().unwrap();
    assert_eq!(documents.encode_whole("ab").unwrap(), [256, 97, 98]);
    documents.save(dir.path()).unwrap();
    assert_eq!(read().encode_whole("ab").unwrap(), [256, 97, 98]);
    assert_eq!(read().with_special_tokens().encode("a[STOP]").unwrap(), [97, 256]);
    assert_eq!(read().encode("a[STOP]").unwrap().len(), 7);
}

#[test]
fn ids_far_above_the_number_of_tokens_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("tokenizer.json");
    let mut json: serde_json::Value = serde_json::from_str(&Tokenizer::bytes().unwrap().json().unwrap()).unwrap();
    json["model"]["vocab"]["far"] = (1u64 << 31).into();
    std::fs::write(&path, json.to_string()).unwrap();
    let message = Tokenizer::from_file(&path).unwrap_err().to_string();
    assert!(message.contains("id 2147483648") && message.contains("258 tokens"), "{message}");
}

#[test]
fn a_damaged_decoder_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("tokenizer.json");
    Tokenizer::bytes().unwrap().save(dir.path()).unwrap();
    let whole = std::fs::read(&path).unwrap();
    let at = whole.windows(9).position(|part| part == b"\"decoder\"").unwrap();
    let at = at + whole[at..].windows(9).position(|part| part == b"ByteLevel").unwrap();
    for part in [&b"Byte\xffevel"[..], b"Byte\\ud800"] {
        let damaged = [&whole[..at], part, &whole[at + 9..]].concat();
        std::fs::write(&path, damaged).unwrap();
        assert!(Tokenizer::from_file(&path).unwrap_err().to_string().contains("not a tokenizer"));
    }
}

#[test]
fn text_that_spells_a_special_token_stays_text() {
    for tokenizer in [Tokenizer::bytes().unwrap(), trained()] {
        let text = "a <|endoftext|> b";
        let ids = tokenizer.encode(text).unwrap();
        assert!(!ids.contains(&tokenizer.separator().unwrap()));
        assert_eq!(tokenizer.decode(&ids).unwrap(), text);
    }
}

#[test]
fn a_file_neither_shortens_nor_pads_nor_changes_at_random() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("tokenizer.json");
    let trained = trained();
    let mut json: serde_json::Value = serde_json::from_str(&trained.json().unwrap()).unwrap();
    json["truncation"] = serde_json::json!({
        "direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0,
    });
    json["padding"] = serde_json::json!({
        "strategy": { "Fixed": 500 }, "direction": "Right", "pad_to_multiple_of": null,
        "pad_id": 0, "pad_type_id": 0, "pad_token": "<|endoftext|>",
    });
    std::fs::write(&path, json.to_string()).unwrap();
    let read = Tokenizer::from_file(&path).unwrap();
    assert_eq!(read.encode(TEXT).unwrap(), trained.encode(TEXT).unwrap());
    json["model"]["dropout"] = 0.1.into();
    std::fs::write(&path, json.to_string()).unwrap();
    let message = Tokenizer::from_file(&path).unwrap_err().to_string();
    assert!(message.contains("tokenizer.json") && message.contains("dropout"), "{message}");
}
