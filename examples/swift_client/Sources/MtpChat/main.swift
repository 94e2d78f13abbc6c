// mtp-chat PATH_OF_MLX_MTP [MODEL]: a server of our own, one question after the other from standard input.

import Foundation

guard CommandLine.arguments.count > 1 else {
    print("usage: MtpChat /path/to/mlx-mtp [MODEL]")
    exit(2)
}
let server = Server()
do {
    let executable = URL(fileURLWithPath: CommandLine.arguments[1])
    let model = CommandLine.arguments.count > 2 ? CommandLine.arguments[2] : "demo"
    let running = try await server.start(executable: executable, model: model)
    var messages: [Message] = []
    while let question = readLine(), !question.isEmpty {
        messages.append(Message(role: "user", content: question))
        var answer = ""
        for try await chunk in chat(with: running, messages: messages) {
            for choice in chunk.choices {
                let text = choice.delta.content ?? ""
                answer += text
                print(text, terminator: "")
                fflush(stdout)
            }
            if let usage = chunk.usage {
                print("\n(\(usage.completionTokens) tokens, \(usage.mtp.accepted) of \(usage.mtp.drafted) drafts accepted)")
            }
        }
        messages.append(Message(role: "assistant", content: answer))
    }
    server.stop()
} catch {
    server.stop()
    print("error: \(error)")
    exit(1)
}
