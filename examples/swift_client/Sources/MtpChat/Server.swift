// Starts `mlx-mtp serve` for this program alone: a free port of loopback, a token for this launch, an end with ours.

import Foundation

/// What the server says on its standard output, a JSON object a line.
struct ServerEvent: Decodable {
    let event: String  // "listening", then "ready"
    let url: URL?
    let token: String?
    let model: String?
}

/// A server that runs; `url` ends in /v1.
struct Running: Sendable {
    let url: URL
    let token: String
    let model: String
}

enum ServerError: Error {
    case ended(status: Int32)  // its standard error, which is ours, has said why
}

final class Server {
    static let arguments = ["--port", "0", "--launch-token", "--exit-with-parent", "--yes"]
    private let process = Process()

    /// Starts it and waits until the model is loaded, which may include a download.
    func start(executable: URL, model: String) async throws -> Running {
        let output = Pipe()
        process.executableURL = executable
        process.arguments = ["serve", model] + Server.arguments
        process.standardOutput = output
        try process.run()
        var running: Running?
        for try await line in output.fileHandleForReading.bytes.lines {
            let event = try JSONDecoder().decode(ServerEvent.self, from: Data(line.utf8))
            switch event.event {
            case "listening":
                if let url = event.url, let token = event.token, let model = event.model {
                    running = Running(url: url, token: token, model: model)
                }
            case "ready":
                if let running { return running }
            default:
                break  // later versions may say more
            }
        }
        process.waitUntilExit()
        throw ServerError.ended(status: process.terminationStatus)
    }

    /// Asks it to end: replies that run have a few seconds.
    func stop() {
        if process.isRunning { process.terminate() }
        process.waitUntilExit()
    }
}
