// A chat completion, streamed: OpenAI's request, server-sent events back.

import Foundation

struct Message: Codable, Sendable {
    let role: String
    let content: String
}

struct ChatRequest: Encodable {
    struct StreamOptions: Encodable {
        let includeUsage: Bool
        enum CodingKeys: String, CodingKey { case includeUsage = "include_usage" }
    }

    let model: String
    let messages: [Message]
    let maxTokens: Int
    let stream = true
    let streamOptions = StreamOptions(includeUsage: true)

    enum CodingKeys: String, CodingKey {
        case model, messages, stream
        case maxTokens = "max_tokens"
        case streamOptions = "stream_options"
    }
}

struct ChatChunk: Decodable {
    struct Choice: Decodable {
        struct Delta: Decodable { let content: String? }
        let delta: Delta
        let finishReason: String?
        enum CodingKeys: String, CodingKey {
            case delta
            case finishReason = "finish_reason"
        }
    }

    struct Usage: Decodable {
        struct Mtp: Decodable {
            let drafted: Int
            let accepted: Int
            let tokensPerSecond: Double
            enum CodingKeys: String, CodingKey {
                case drafted, accepted
                case tokensPerSecond = "tokens_per_second"
            }
        }

        let completionTokens: Int
        let mtp: Mtp
        enum CodingKeys: String, CodingKey {
            case mtp
            case completionTokens = "completion_tokens"
        }
    }

    let choices: [Choice]
    let usage: Usage?
}

/// Also what an event of a stream holds where the reply cannot go on.
struct ErrorBody: Decodable {
    struct Detail: Decodable { let message: String }
    let error: Detail
}

enum ChatError: Error {
    case refused(String)  // the message ends in what to do
}

/// Streams a reply's chunks; cancelling the task closes the connection, which cancels the reply within a round.
func chat(with server: Running, messages: [Message], maxTokens: Int = 512) -> AsyncThrowingStream<ChatChunk, Error> {
    AsyncThrowingStream { continuation in
        let task = Task {
            do {
                var request = URLRequest(url: server.url.appendingPathComponent("chat/completions"))
                request.httpMethod = "POST"
                request.timeoutInterval = 600
                request.setValue("application/json", forHTTPHeaderField: "Content-Type")
                request.setValue("Bearer \(server.token)", forHTTPHeaderField: "Authorization")
                request.httpBody = try JSONEncoder().encode(
                    ChatRequest(model: server.model, messages: messages, maxTokens: maxTokens))
                let (bytes, response) = try await URLSession.shared.bytes(for: request)
                if (response as? HTTPURLResponse)?.statusCode != 200 {
                    var body = Data()
                    for try await byte in bytes { body.append(byte) }
                    throw ChatError.refused(try JSONDecoder().decode(ErrorBody.self, from: body).error.message)
                }
                for try await line in bytes.lines {
                    guard line.hasPrefix("data: ") else { continue }  // ": ..." keeps the connection open
                    let data = line.dropFirst("data: ".count)
                    if data == "[DONE]" { break }
                    if let failed = try? JSONDecoder().decode(ErrorBody.self, from: Data(data.utf8)) {
                        throw ChatError.refused(failed.error.message)
                    }
                    continuation.yield(try JSONDecoder().decode(ChatChunk.self, from: Data(data.utf8)))
                }
                continuation.finish()
            } catch {
                continuation.finish(throwing: error)
            }
        }
        continuation.onTermination = { _ in task.cancel() }
    }
}
